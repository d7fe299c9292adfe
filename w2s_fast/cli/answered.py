"""What an output of an earlier run has answered, and whether this run would answer the same."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

from w2s_fast.cli.jsonl import RECORD_START, BadLine, MadeBy, Request, parse_json
from w2s_fast.errors import InvalidRequest

_BLOCK = 1 << 20


class Answer(NamedTuple):
    """What an output line says about an input line."""

    fingerprint: str
    failed: bool


def read_answers(path: Path, made_by: MadeBy) -> tuple[dict[int, Answer], int]:
    """The answers by line index, and the bytes they take; half a line at the end is left out.

    Raises:
        InvalidRequest: the file is something else, or was made by others than ``made_by``.
    """
    answers: dict[int, Answer] = {}
    whole_bytes = number = 0
    with path.open("rb") as file:
        end = _end_of_data(file)
        start = file.read(min(end, len(RECORD_START)))
        if not RECORD_START.startswith(start):  # the rest may be one endless line
            raise _not_ours(path, 1)
        file.seek(0)
        while line := file.readline(end - whole_bytes):
            number += 1
            is_last = whole_bytes + len(line) == end
            if not line.endswith(b"\n") or (is_last and b"\0" in line):
                # Only what looks like the start of a record may be cut off later.
                if not (line.startswith(RECORD_START) or RECORD_START.startswith(line)):
                    raise _not_ours(path, number)
                break
            try:
                record = parse_json(line)
                answers[int(record["index"])] = Answer(
                    str(record["fingerprint"]), "error" in record
                )
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise _not_ours(path, number) from error
            check_same_makers(record.get("made_by"), made_by, path)
            whole_bytes += len(line)
    return answers, whole_bytes


def _end_of_data(file: BinaryIO) -> int:
    """Bytes of a file without the zeros at its end, which a crash leaves where no data arrived."""
    end = file.seek(0, io.SEEK_END)
    while end:
        begin = max(0, end - _BLOCK)
        file.seek(begin)
        data = file.read(end - begin).rstrip(b"\0")
        end = begin + len(data)
        if data:
            break
    file.seek(0)
    return end


def _not_ours(path: Path, number: int) -> InvalidRequest:
    return InvalidRequest(f"cannot resume: line {number} of {path} is no record of w2s-fast")


def check_same_makers(then: object, now: MadeBy, path: Path) -> None:
    """What made an answer must be what makes the others; what differs is named."""
    if then == now:
        return
    if not isinstance(then, dict):
        raise InvalidRequest(
            f"cannot resume: {path} does not say what made it, as an earlier version of w2s-fast "
            "wrote it; use another --output"
        )
    differing = [name for name in {**now, **then} if now.get(name) != then.get(name)]
    told = "; ".join(
        f"{name}: {then.get(name, 'none')} then, {now.get(name, 'none')} now" for name in differing
    )
    raise InvalidRequest(
        f"cannot resume: {path} was made by others ({told}); use the same, or another --output"
    )


def check_same_run(answers: Mapping[int, Answer], requests: Iterable[Request | BadLine]) -> None:
    """Half-matching files are refused as a whole: mixing two runs in one file helps nobody."""
    unmatched = {index: answer.fingerprint for index, answer in answers.items()}
    for request in requests if unmatched else ():
        if unmatched.pop(request.index, request.fingerprint) != request.fingerprint:
            raise InvalidRequest(
                f"cannot resume: the answer to line index {request.index} was made with another "
                "prompt or other parameters; use the same, or another --output"
            )
    if unmatched:
        raise InvalidRequest(
            f"cannot resume: line index {min(unmatched)} is answered, but not in the input"
        )
