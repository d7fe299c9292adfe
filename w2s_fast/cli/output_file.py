"""OutputFile: an output of whole lines that a later run can go on with."""

from __future__ import annotations

import fcntl
import io
import json
import os
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple

from w2s_fast.cli.jsonl import RECORD_START, BadLine, Record, Request, encode_record
from w2s_fast.errors import InvalidRequest


class Answer(NamedTuple):
    """What an output line says about an input line."""

    fingerprint: str
    failed: bool


class OutputFile:
    """A file that only ever grows by whole lines, held by one process at a time.

    Attributes:
        done: indices of the input lines whose records stand in the file.
        failed_before: how many of them are error records.
        cut_bytes: length of the half-written line that was cut off; 0 if there was none.
    """

    def __init__(
        self,
        file: BinaryIO,
        done: frozenset[int] = frozenset(),
        failed_before: int = 0,
        cut_bytes: int = 0,
    ) -> None:
        self._file = file
        self.done = done
        self.failed_before = failed_before
        self.cut_bytes = cut_bytes

    @classmethod
    def create(cls, path: Path) -> OutputFile:
        """A new file. InvalidRequest if it exists: an answer is never overwritten."""
        try:
            file = path.open("xb")
        except FileExistsError as error:
            raise already_there(path) from error
        _lock(file, path)
        return cls(file)

    @classmethod
    def resume(
        cls, path: Path, requests: Iterable[Request | BadLine], retry_errors: bool = False
    ) -> OutputFile:
        """An existing file to go on with, or a new one if there is none.

        A crash can leave half a line at the end of a file; it is cut off.

        Args:
            path: the output of an earlier run.
            requests: all of the input; each answer in the file must belong to one of them.
            retry_errors: drop error records, so that their lines are tried again.

        Raises:
            InvalidRequest: the file is something else, or belongs to another run. It is unchanged.
        """
        if not path.exists():
            return cls.create(path)
        file: BinaryIO = path.open("r+b")
        _lock(file, path)
        answers, whole_bytes = _read_answers(file, path)
        _check_same_run(answers, requests)
        cut_bytes = path.stat().st_size - whole_bytes
        file.truncate(whole_bytes)
        failed = {index for index, answer in answers.items() if answer.failed}
        if retry_errors and failed:
            file = _without(file, path, failed)
            answers = {index: answer for index, answer in answers.items() if not answer.failed}
            failed = set()
        file.seek(0, io.SEEK_END)
        return cls(file, frozenset(answers), len(failed), cut_bytes)

    def write(self, record: Record) -> None:
        """Appends one record and hands it to the operating system."""
        self._file.write(encode_record(record))
        self._file.flush()

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()


def already_there(path: Path) -> InvalidRequest:
    """The error for an output that exists when nothing is to be resumed."""
    return InvalidRequest(f"{path} exists: --resume goes on with it, another --output spares it")


def _read_answers(file: BinaryIO, path: Path) -> tuple[dict[int, Answer], int]:
    """The answers by line index, and the bytes they take; half a line at the end is left out."""
    answers: dict[int, Answer] = {}
    whole_bytes = 0
    for number, line in enumerate(file, start=1):
        if not line.endswith(b"\n"):
            # Only what looks like the start of a record may be cut off later.
            if not (line.startswith(RECORD_START) or RECORD_START.startswith(line)):
                raise _not_ours(path, number)
            break
        try:
            record = json.loads(line)
            answers[int(record["index"])] = Answer(str(record["fingerprint"]), "error" in record)
        except (ValueError, TypeError, KeyError) as error:
            raise _not_ours(path, number) from error
        whole_bytes += len(line)
    return answers, whole_bytes


def _without(file: BinaryIO, path: Path, dropped: Set[int]) -> BinaryIO:
    """Takes the records of some lines out of the file at `path`.

    A new file takes the old one's place in one step, so that a crash leaves one of them whole.
    """
    draft = path.with_name(path.name + ".part")
    copy = draft.open("wb")
    _lock(copy, draft)
    with file:
        file.seek(0)
        copy.writelines(line for line in file if json.loads(line)["index"] not in dropped)
        copy.flush()
        os.replace(draft, path)
    return copy


def _not_ours(path: Path, number: int) -> InvalidRequest:
    return InvalidRequest(f"cannot resume: line {number} of {path} is no record of w2s-fast")


def _check_same_run(answers: Mapping[int, Answer], requests: Iterable[Request | BadLine]) -> None:
    """Half-matching files are refused as a whole: mixing two runs in one file helps nobody."""
    unmatched = {index: answer.fingerprint for index, answer in answers.items()}
    for request in requests if unmatched else ():
        if unmatched.pop(request.index, request.fingerprint) != request.fingerprint:
            raise InvalidRequest(
                f"cannot resume: the answer to line index {request.index} was made with another "
                "prompt, other parameters or other models; use the same, or another --output"
            )
    if unmatched:
        raise InvalidRequest(
            f"cannot resume: line index {min(unmatched)} is answered, but not in the input"
        )


def _lock(file: BinaryIO, path: Path) -> None:
    """Released by the operating system when the process ends, however it ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise InvalidRequest(f"{path} is being written by another process") from error
