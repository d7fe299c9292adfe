"""`w2s-fast trace`: search trees that `generate --trace` has written, as a page to look at."""

from __future__ import annotations

import webbrowser
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from w2s_fast.cli.console import note, quiet_transformers
from w2s_fast.cli.identity import model_identity
from w2s_fast.cli.jsonl import Record, parse_json
from w2s_fast.cli.lines import LongLine, read_lines
from w2s_fast.cli.models import name_models
from w2s_fast.cli.options import FILES, MODELS, option
from w2s_fast.errors import InvalidRequest, UnsupportedModel
from w2s_fast.result import Candidate, Round

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def trace(
    answers: Annotated[
        Path,
        typer.Argument(help="JSONL of `generate --trace`", exists=True, dir_okay=False),
    ],
    output: Annotated[
        Path | None,
        option("--output", help="The page; not given: beside the answers, .html", panel=FILES),
    ] = None,
    prompts: Annotated[
        Path | None,
        option(
            "--input",
            help="What was asked: the page shows its prompts",
            panel=FILES,
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        option(
            "--tokenizer",
            help="Path or hub id of the base; not given: the bundled one",
            panel=MODELS,
        ),
    ] = None,
    open_: Annotated[bool, option("--open", help="Show it in a browser.", panel=FILES)] = False,
) -> None:
    """Make a page of saved search trees: the viewer of `w2s-fast serve`, without a server."""
    from w2s_fast.serve import saved_events, saved_page

    records = [record for record in _records(answers) if record.get("trace")]
    if not records:
        raise InvalidRequest(f"{answers} holds no traces; allowed: answers of generate --trace")
    asked = {} if prompts is None else dict(enumerate(_records(prompts)))
    decode = _decoder(tokenizer or name_models().base, records[0])
    searches = []
    for record in records:
        done = {key: record.get(key) for key in ("text", "score", "finish_reason", "usage")}
        prompt = _shown(asked.get(record["index"], {}))
        events = saved_events(prompt, _rounds(record), decode, done)
        title = str(record.get("id", f"line {record['index'] + 1}"))
        searches.append(
            {"title": f"{title}: {prompt[:60]}" if prompt else title, "events": [*events]}
        )
    page = output or answers.with_suffix(".html")
    page.write_text(saved_page(answers.name, searches), encoding="utf-8")
    note(f"{len(searches)} {'search' if len(searches) == 1 else 'searches'}")
    typer.echo(page)
    if open_:
        webbrowser.open(page.absolute().as_uri())


def _records(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, line in enumerate(read_lines(file), 1):
            try:
                found = None if isinstance(line, LongLine) else parse_json(line)
            except (ValueError, RecursionError):
                found = None
            if not isinstance(found, dict):
                raise InvalidRequest(f"{path}: line {number} is no record")
            yield found


def _rounds(record: Record) -> list[Round]:
    try:
        return [
            Round([Candidate(**candidate) for candidate in one["candidates"]], one["kept"])
            for one in record["trace"]["rounds"]
        ]
    except (KeyError, TypeError) as error:
        raise InvalidRequest(f"the trace of line {record.get('index')} is none: {error}") from None


def _decoder(name: str, record: Record) -> Callable[[list[int]], str]:
    """From token ids of these answers to their texts; of a remote base texts are all there is."""
    from w2s_fast.text import decode_response

    if "base server" in (record.get("made_by") or {}):
        return str
    tokenizer = _tokenizer_of(name, record)
    return lambda ids: decode_response(tokenizer, (), ids)


def _tokenizer_of(name: str, record: Record) -> PreTrainedTokenizerBase:
    """That which the answers were written with. InvalidRequest: it is another one."""
    quiet_transformers()
    from w2s_fast.models import load_tokenizer

    made_by: dict[str, Any] = record.get("made_by") or {}
    wanted = made_by.get("base tokenizer")
    if wanted is not None and model_identity(name).get("tokenizer", wanted) != wanted:
        raise InvalidRequest(
            f"the answers were written with another tokenizer than that of {name}; allowed: their "
            "base, by --tokenizer"
        )
    found = load_tokenizer(name)
    if found is None:
        raise UnsupportedModel(f"--tokenizer {name}: there is no tokenizer")
    return found


def _shown(asked: Record) -> str:
    """A prompt as one text."""
    prompt = asked.get("prompt", asked.get("messages", ""))
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
        return "".join(f"[{m.get('role')}] {m.get('content')}\n" for m in prompt)
    return ""
