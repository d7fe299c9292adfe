"""What a terminal shows of a search under way, and what it is left with."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from w2s_fast import Engine, SearchParams, SearchResult
from w2s_fast.cli import single
from w2s_fast.cli.growing import Growing
from w2s_fast.cli.single import search_shown
from w2s_fast.demo import DemoModels


def terminal(width: int = 40, height: int = 6) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=True, width=width, height=height, highlight=False
    )


def pipe() -> Console:
    return Console(file=io.StringIO(), force_terminal=False)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def frame(growing: Growing, console: Console) -> list[str]:
    """The lines that are shown at present."""
    with console.capture() as shown:
        console.print(growing._seen())
    lines = re.sub(r"\x1b\[[\d;?]*\w", "", shown.get()).splitlines()
    return [line.rstrip() for line in lines]


def test_the_text_grows_above_what_is_said() -> None:
    console = terminal()
    growing = Growing(console, console, lambda: "round 2", "A day")
    assert frame(growing, console) == ["A day", "round 2"]
    growing.add(" in May")
    growing.add(",\nlong ago")
    assert frame(growing, console) == ["A day in May,", "long ago", "round 2"]


def test_of_a_long_text_the_end_is_shown() -> None:
    console = terminal(width=10, height=6)
    growing = Growing(console, console, lambda: "a line that is too long for this terminal")
    growing.add(" ".join(f"word-{i:03}" for i in range(50)))
    shown = frame(growing, console)
    assert shown[:4] == ["word-046", "word-047", "word-048", "word-049"]
    assert len(shown) == 5 and len(shown[-1]) == 10


def test_nothing_in_a_text_is_obeyed() -> None:
    console = terminal()
    growing = Growing(console, console, lambda: "", "\x1b[31mred")
    growing.add("\x1b]0;title\x07 \x1b[2J[bold]x[/bold]")
    shown = "".join(frame(growing, console))
    assert "\x07" not in shown and "\N{REPLACEMENT CHARACTER}[2J" in shown
    assert shown.startswith("\N{REPLACEMENT CHARACTER}[31mred") and "[bold]x[/bold]" in shown


def test_each_stream_shows_its_own() -> None:
    for out, notes in ((terminal(), pipe()), (pipe(), terminal()), (pipe(), pipe())):
        with Growing(out, notes, lambda: "a round") as growing:
            growing.add("some text")
        assert ("some text" in written(out)) == out.is_terminal
        assert ("a round" in written(notes)) == notes.is_terminal
        assert written(out) == "" or out.is_terminal


@pytest.fixture(scope="module")
def engine(models: DemoModels) -> Engine:
    return Engine(models.base, device="cpu", kv_cache_tokens=4096)


def searched(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> tuple[SearchResult, list[str]]:
    """A search of one prompt, and all that its text was, one after the other."""
    texts = [""]
    console = terminal(width=400)
    monkeypatch.setattr(single, "out_console", lambda: console)
    monkeypatch.setattr(single, "note_console", pipe)
    add = Growing.add

    def heard(growing: Growing, text: str) -> None:
        add(growing, text)
        texts.append(texts[-1] + text)

    monkeypatch.setattr(Growing, "add", heard)
    params = SearchParams(method="sample", max_new_tokens=60, ignore_eos=True, seed=3)
    return search_shown(engine, "The film", params), texts


def test_an_answer_is_shown_piece_by_piece_and_is_the_same(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, texts = searched(engine, monkeypatch)
    params = SearchParams(method="sample", max_new_tokens=60, ignore_eos=True, seed=3)
    (alone,) = engine.generate(["The film"], params)
    assert result.token_ids == alone.token_ids and result.text == alone.text
    assert result.text is not None and result.text.startswith(texts[-1])
    assert len(set(texts)) > 5
