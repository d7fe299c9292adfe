"""JSONL in and out: one request a line, one record a line, and nothing lost on interruption.

An input line is ``{"prompt": ..., "id": ..., <any SearchParams field>: ...}``; only the prompt is
needed. It is a string, a list of token ids, or a list of chat messages, which may be called
``"messages"``, too; beside messages there may be ``"tools"``, ``"chat_template_kwargs"`` and
``"continue_final_message"``, as :class:`w2s_fast.Chat` has them. Blank lines are skipped, but count
as lines. A line that cannot be used gives an error record and harms no other: what is no JSON
(``NaN`` and ``Infinity`` are none), a key that comes twice, more than 100 levels, 32 MiB.

An output record has the ``index`` of its line (from 0), a ``fingerprint`` of everything that
decides the answer, and ``made_by``, that part of it which is the same for all lines: so a later run
knows which answers it may keep, and why not (see :mod:`w2s_fast.cli.output_file`). Both files are
UTF-8, whatever the terminal's encoding is.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from w2s_fast.cli.asking import PLAINLY, Asking
from w2s_fast.cli.lines import MAX_LINE_BYTES, LongLine
from w2s_fast.errors import InvalidRequest, W2SFastError
from w2s_fast.params import SearchParams
from w2s_fast.result import Hypothesis, SearchResult, Trace

if TYPE_CHECKING:
    from w2s_fast import Chat

Prompt = str | list[int] | list[dict[str, Any]]
Record = dict[str, Any]
MadeBy = dict[str, str]  # what answers all lines, part by part: see w2s_fast.cli.models

CHAT_NAMES = frozenset(("tools", "chat_template_kwargs", "continue_final_message"))
PARAM_NAMES = frozenset(field.name for field in fields(SearchParams))
RECORD_START = b'{"index": '  # of every output line: `index` comes first
# Python's own limit depends on how deep the stack is at the moment, and is another for writing.
_MAX_DEPTH = 100
_MESSAGES = 'a list of chat messages ({"role": ..., "content": ...})'
_MAX_MESSAGE = 1000  # characters: an error may quote what was given


@dataclass(frozen=True)
class Request:
    """A usable input line."""

    index: int
    fingerprint: str
    id: Any
    made_by: MadeBy
    prompt: Prompt
    params: SearchParams
    chat_options: Record = field(default_factory=dict)

    @property
    def for_engine(self) -> Prompt | Chat:
        """The prompt as an engine takes it."""
        if not self.chat_options:
            return self.prompt
        from w2s_fast import Chat  # which imports what takes seconds

        messages: Any = self.prompt
        return Chat(messages, **self.chat_options)


@dataclass(frozen=True)
class BadLine:
    """An input line that cannot be used, and why."""

    index: int
    fingerprint: str
    id: Any
    made_by: MadeBy
    error: InvalidRequest


def read_requests(
    lines: Iterable[bytes | LongLine],
    defaults: SearchParams,
    made_by: MadeBy,
    asking: Asking = PLAINLY,
) -> Iterator[Request | BadLine]:
    """Parses lines one by one, as they are asked for.

    Args:
        lines: UTF-8, one JSON object each.
        defaults: the parameters of a line that sets none.
        made_by: names what answers; part of every fingerprint.
        asking: how prompts that are strings are put.
    """
    for index, line in enumerate(lines):
        if isinstance(line, LongLine) or line.strip():
            yield _read_line(index, line, defaults, made_by, asking)


def _read_line(
    index: int, line: bytes | LongLine, defaults: SearchParams, made_by: MadeBy, asking: Asking
) -> Request | BadLine:
    given: Record = {}
    try:
        given = _parse_object(line)
        prompt = _checked_prompt(given, asking)
        options = _chat_options(given, prompt)
        params = _merged(defaults, given)
    except InvalidRequest as error:
        bad = line.digest if isinstance(line, LongLine) else line.strip().decode("utf-8", "replace")
        print_ = _hash({"line": bad, "models": made_by, **asdict(defaults)})
        return BadLine(index, print_, given.get("id"), made_by, error)
    print_ = fingerprint(made_by, given.get("id"), prompt, params, options)
    return Request(index, print_, given.get("id"), made_by, prompt, params, options)


def _parse_object(line: bytes | LongLine) -> Record:
    if isinstance(line, LongLine):
        raise InvalidRequest(f"the line has {line.length} bytes; allowed: {MAX_LINE_BYTES} at most")
    try:
        given = parse_json(line)
        # JSON can spell half a surrogate pair, which no UTF-8 file can hold.
        json.dumps(given, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"not a line of JSON in UTF-8: {error}") from error
    if not isinstance(given, dict):
        raise InvalidRequest(f"a line must be an object, not {type(given).__name__}")
    unknown = sorted(set(given) - PARAM_NAMES - CHAT_NAMES - {"prompt", "messages", "id"})
    if unknown:
        allowed = ", ".join(["prompt", "messages", "id", *sorted(CHAT_NAMES), *sorted(PARAM_NAMES)])
        raise InvalidRequest(f"unknown keys: {', '.join(map(repr, unknown))}; allowed: {allowed}")
    return given


def parse_json(line: bytes) -> Any:
    """What one line says, if it is JSON by the letter.

    Raises:
        ValueError: it is not, or holds a key twice, a number that is too large, or a value that is
            nested too deep.
        RecursionError: nested so deep that it was not even read.
    """
    value = json.loads(
        line.decode("utf-8"),
        parse_constant=_refused_constant,
        parse_float=_finite_float,
        object_pairs_hook=_unique_keys,
    )
    level, depth = [value], 0
    while level := [each for each in level if isinstance(each, (dict, list))]:
        depth += 1
        if depth > _MAX_DEPTH:
            raise ValueError(f"nested more than {_MAX_DEPTH} levels deep")
        level = [
            inner for each in level for inner in (each.values() if isinstance(each, dict) else each)
        ]
    return value


def _refused_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _finite_float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits} is too large for a number")
    return number


def _unique_keys(pairs: list[tuple[str, Any]]) -> Record:
    found: Record = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} comes twice")
        found[key] = value
    return found


def _checked_prompt(given: Record, asking: Asking) -> Prompt:
    if "messages" in given:
        if "prompt" in given:
            raise InvalidRequest("the line has a prompt and messages; allowed: one of the two")
        if not _are_messages(given["messages"]):
            raise InvalidRequest(f"messages must be {_MESSAGES}, not empty")
        messages: Prompt = given["messages"]
        return messages
    if "prompt" not in given:
        raise InvalidRequest("the line has no prompt")
    prompt = given["prompt"]
    if isinstance(prompt, str):
        return asking.prompt(prompt)
    if isinstance(prompt, list) and prompt:
        if all(isinstance(part, int) and not isinstance(part, bool) for part in prompt):
            return prompt
        if _are_messages(prompt):
            return prompt
    raise InvalidRequest(f"prompt must be a string, a list of token ids, or {_MESSAGES}, not empty")


def _are_messages(given: Any) -> bool:
    """One that calls tools may have no content."""
    return (
        isinstance(given, list)
        and bool(given)
        and all(isinstance(part, dict) and "role" in part and len(part) > 1 for part in given)
    )


def _chat_options(given: Record, prompt: Prompt) -> Record:
    """What a line says about its chat beside the messages; checked further by the engine."""
    options = {name: value for name, value in given.items() if name in CHAT_NAMES}
    if options and not (isinstance(prompt, list) and isinstance(prompt[0], dict)):
        names = ", ".join(map(repr, sorted(options)))
        raise InvalidRequest(f"{names} beside a prompt that is no list of chat messages")
    return options


def _merged(defaults: SearchParams, given: Record) -> SearchParams:
    own = {name: value for name, value in given.items() if name in PARAM_NAMES}
    try:
        return replace(defaults, **own)
    except TypeError as error:  # a field of a type that the checks themselves trip over
        raise InvalidRequest(f"cannot use {own}: {error}") from error


def fingerprint(
    made_by: MadeBy,
    id: Any,
    prompt: Prompt,
    params: SearchParams,
    chat_options: Mapping[str, Any] | None = None,
) -> str:
    """Short hash of everything that decides a record; device and memory do not."""
    parts = {"models": made_by, "id": id, "prompt": prompt, **asdict(params)}
    return _hash(parts | dict(chat_options or {}))


def _hash(parts: Mapping[str, Any]) -> str:
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def answer_record(request: Request, result: SearchResult) -> Record:
    """The output line of a finished request, failed ones included."""
    if result.error is not None:
        return _error_record(request, result.error)
    record = _record_head(request) | _hypothesis_record(result.hypotheses[0])
    if request.params.n > 1:
        record["hypotheses"] = [_hypothesis_record(each) for each in result.hypotheses]
    record["usage"] = _without_none(asdict(result.usage), "remote")
    if result.ended_early is not None:
        record["ended_early"] = result.ended_early
    if result.trace is not None:
        record["trace"] = _trace_record(result.trace)
    return record | _record_tail(request)


def _trace_record(trace: Trace) -> Record:
    """What only a remote base has is left out where there is none."""
    record = asdict(trace)
    for one in record["rounds"]:
        one["candidates"] = [_without_none(each, "text") for each in one["candidates"]]
    return record if trace.prompt is not None else {"rounds": record["rounds"]}


def _without_none(record: Record, name: str) -> Record:
    return {key: value for key, value in record.items() if key != name or value is not None}


def bad_line_record(bad: BadLine) -> Record:
    """The output line of an input line that cannot be used."""
    return _error_record(bad, bad.error)


def _error_record(line: Request | BadLine, error: W2SFastError) -> Record:
    message = str(error)
    if len(message) > _MAX_MESSAGE:
        message = f"{message[: _MAX_MESSAGE // 2]} ... {message[-_MAX_MESSAGE // 2 :]}"
    told = {"type": type(error).__name__, "message": message}
    return _record_head(line) | {"error": told} | _record_tail(line)


def _record_head(line: Request | BadLine) -> Record:
    return {"index": line.index} | ({} if line.id is None else {"id": line.id})


def _record_tail(line: Request | BadLine) -> Record:
    return {"fingerprint": line.fingerprint, "made_by": line.made_by}


def _hypothesis_record(hypothesis: Hypothesis) -> Record:
    return {
        "text": hypothesis.text,
        "token_ids": hypothesis.token_ids,
        "score": hypothesis.score,
        "finish_reason": hypothesis.finish_reason,
    }


def encode_record(record: Record) -> bytes:
    """One output line of JSON, newline included. A number that is not finite is null."""
    try:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(_with_nulls(record), ensure_ascii=False, allow_nan=False)
    # Half a surrogate pair cannot be written as UTF-8, but its escape is JSON.
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _with_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_nulls(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_nulls(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
