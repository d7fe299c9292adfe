"""JSONL in and out: one request a line, one record a line, and nothing lost on interruption.

An input line is ``{"prompt": ..., "id": ..., <any SearchParams field>: ...}``; only the prompt is
needed. It is a string, a list of token ids, or a list of chat messages. Blank lines are skipped,
but count as lines. A line that cannot be used gives an error record and harms no other.

An output record has the ``index`` of its line (from 0) and a ``fingerprint`` of everything that
decides the answer, so that a later run knows which answers it may keep
(see :mod:`w2s_fast.cli.output_file`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from w2s_fast.errors import InvalidRequest, W2SFastError
from w2s_fast.params import SearchParams
from w2s_fast.result import Hypothesis, SearchResult

Prompt = str | list[int] | list[dict[str, Any]]
Record = dict[str, Any]

PARAM_NAMES = frozenset(field.name for field in fields(SearchParams))
RECORD_START = b'{"index": '  # of every output line: `index` comes first


@dataclass(frozen=True)
class Request:
    """A usable input line."""

    index: int
    fingerprint: str
    id: Any
    prompt: Prompt
    params: SearchParams


@dataclass(frozen=True)
class BadLine:
    """An input line that cannot be used, and why."""

    index: int
    fingerprint: str
    id: Any
    error: InvalidRequest


def read_requests(
    lines: Iterable[bytes], defaults: SearchParams, models: Mapping[str, Any]
) -> Iterator[Request | BadLine]:
    """Parses lines one by one, as they are asked for.

    Args:
        lines: UTF-8, one JSON object each.
        defaults: the parameters of a line that sets none.
        models: names what answers; part of every fingerprint.
    """
    for index, line in enumerate(lines):
        if line.strip():
            yield _read_line(index, line, defaults, models)


def _read_line(
    index: int, line: bytes, defaults: SearchParams, models: Mapping[str, Any]
) -> Request | BadLine:
    given: Record = {}
    try:
        given = _parse_object(line)
        prompt = _checked_prompt(given)
        params = _merged(defaults, given)
    except InvalidRequest as error:
        whole = {"line": line.strip().decode("utf-8", "replace"), "models": models}
        return BadLine(index, _hash({**whole, **asdict(defaults)}), given.get("id"), error)
    print_ = fingerprint(models, given.get("id"), prompt, params)
    return Request(index, print_, given.get("id"), prompt, params)


def _parse_object(line: bytes) -> Record:
    try:
        given = json.loads(line.decode("utf-8"))
        # JSON can spell half a surrogate pair, which no UTF-8 file can hold.
        json.dumps(given, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"not a line of JSON in UTF-8: {error}") from error
    if not isinstance(given, dict):
        raise InvalidRequest(f"a line must be an object, not {type(given).__name__}")
    unknown = sorted(set(given) - PARAM_NAMES - {"prompt", "id"})
    if unknown:
        allowed = ", ".join(["prompt", "id", *sorted(PARAM_NAMES)])
        raise InvalidRequest(f"unknown keys: {', '.join(map(repr, unknown))}; allowed: {allowed}")
    return given


def _checked_prompt(given: Record) -> Prompt:
    if "prompt" not in given:
        raise InvalidRequest("the line has no prompt")
    prompt = given["prompt"]
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and prompt:
        if all(isinstance(part, int) and not isinstance(part, bool) for part in prompt):
            return prompt
        if all(isinstance(part, dict) and {"role", "content"} <= set(part) for part in prompt):
            return prompt
    raise InvalidRequest(
        "prompt must be a string, a list of token ids, or a list of chat messages "
        '({"role": ..., "content": ...}), not empty'
    )


def _merged(defaults: SearchParams, given: Record) -> SearchParams:
    own = {name: value for name, value in given.items() if name in PARAM_NAMES}
    try:
        return replace(defaults, **own)
    except TypeError as error:  # a field of a type that the checks themselves trip over
        raise InvalidRequest(f"cannot use {own}: {error}") from error


def fingerprint(models: Mapping[str, Any], id: Any, prompt: Prompt, params: SearchParams) -> str:
    """Short hash of everything that decides a record; device and memory do not."""
    return _hash({"models": models, "id": id, "prompt": prompt, **asdict(params)})


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
    record["usage"] = asdict(result.usage)
    if result.trace is not None:
        record["trace"] = asdict(result.trace)
    return record | {"fingerprint": request.fingerprint}


def bad_line_record(bad: BadLine) -> Record:
    """The output line of an input line that cannot be used."""
    return _error_record(bad, bad.error)


def _error_record(line: Request | BadLine, error: W2SFastError) -> Record:
    told = {"type": type(error).__name__, "message": str(error)}
    return _record_head(line) | {"error": told, "fingerprint": line.fingerprint}


def _record_head(line: Request | BadLine) -> Record:
    return {"index": line.index} | ({} if line.id is None else {"id": line.id})


def _hypothesis_record(hypothesis: Hypothesis) -> Record:
    return {
        "text": hypothesis.text,
        "token_ids": hypothesis.token_ids,
        "score": hypothesis.score,
        "finish_reason": hypothesis.finish_reason,
    }


def encode_record(record: Record) -> bytes:
    """One output line, newline included."""
    # Half a surrogate pair cannot be written as UTF-8, but its escape is JSON.
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
