"""OutputFile: an output of whole lines that a later run can go on with."""

from __future__ import annotations

import fcntl
import io
import os
import shutil
from collections.abc import Iterable, Set
from contextlib import suppress
from pathlib import Path
from tempfile import mkstemp
from types import TracebackType

from w2s_fast.cli.answered import check_same_run, read_answers
from w2s_fast.cli.jsonl import BadLine, MadeBy, Record, Request, encode_record, parse_json
from w2s_fast.cli.paths import already_there
from w2s_fast.errors import InvalidRequest, WriteFailed


class OutputFile:
    """A file that only ever grows by whole lines, held by one process at a time.

    Attributes:
        done: indices of the input lines whose records stand in the file.
        failed_before: how many of them are error records.
        cut_bytes: length of the half-written line that was cut off; 0 if there was none.
    """

    def __init__(
        self,
        path: Path,
        file: io.FileIO,
        done: frozenset[int] = frozenset(),
        failed_before: int = 0,
        cut_bytes: int = 0,
        *,
        is_new: bool = False,
    ) -> None:
        self._path = path
        self._file = file
        self._is_new = is_new
        self.done = done
        self.failed_before = failed_before
        self.cut_bytes = cut_bytes

    @classmethod
    def create(cls, path: Path) -> OutputFile:
        """A new file. InvalidRequest if it exists: an answer is never overwritten."""
        try:
            file = path.open("xb", buffering=0)
        except FileExistsError as error:
            raise already_there(path) from error
        lock(file, path)
        return cls(path, file, is_new=True)

    @classmethod
    def resume(
        cls,
        path: Path,
        requests: Iterable[Request | BadLine],
        made_by: MadeBy,
        retry_errors: bool = False,
    ) -> OutputFile:
        """An existing file to go on with, or a new one if there is none.

        A crash can leave half a line at the end of a file, and one of the whole machine zeros
        behind it; they are cut off.

        Args:
            path: the output of an earlier run.
            requests: all of the input; each answer in the file must belong to one of them.
            made_by: what answers now; it must be what made the answers in the file.
            retry_errors: drop error records, so that their lines are tried again.

        Raises:
            InvalidRequest: the file is something else, or belongs to another run. It is unchanged.
        """
        if not path.exists():
            return cls.create(path)
        path = path.resolve()
        file = path.open("r+b", buffering=0)
        try:
            lock(file, path)
            answers, whole_bytes = read_answers(path, made_by)
            check_same_run(answers, requests)
            cut_bytes = path.stat().st_size - whole_bytes
            file.truncate(whole_bytes)
            failed = {index for index, answer in answers.items() if answer.failed}
            if retry_errors and failed:
                file = _without(file, path, failed)
                answers = {index: answer for index, answer in answers.items() if not answer.failed}
                failed = set()
            file.seek(0, io.SEEK_END)
        except BaseException:
            file.close()
            raise
        return cls(path, file, frozenset(answers), len(failed), cut_bytes)

    def write(self, record: Record) -> None:
        """Appends one record and hands it to the operating system.

        Raises:
            WriteFailed: the disk is full, or the like. Nothing of the record is in the file.
        """
        whole_bytes = self._file.tell()
        try:
            _write_all(self._file, encode_record(record))
        except OSError as error:
            with suppress(OSError):  # if it stays, it is half a line, which --resume cuts off
                self._file.truncate(whole_bytes)
                self._file.seek(whole_bytes)
            raise self._failed(error) from error
        self._is_new = False

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None and self._is_new:
            with suppress(OSError):  # an empty file would be in the way of the next attempt
                self._path.unlink()
        try:
            self._file.close()
        except OSError as closing:
            if error is None:
                raise self._failed(closing) from closing

    def _failed(self, error: OSError) -> WriteFailed:
        return WriteFailed(
            f"{self._path}: {error.strerror}; what was written before is whole, "
            "and --resume goes on with it"
        )


def _without(file: io.FileIO, path: Path, dropped: Set[int]) -> io.FileIO:
    """Takes the records of some lines out of the file at `path`.

    A new file takes the old one's place in one step, so that a crash leaves one of them whole.
    """
    handle, name = mkstemp(dir=path.parent, prefix=path.name)
    copy, draft = io.FileIO(handle, "r+b"), Path(name)
    try:
        with path.open("rb") as old:
            for line in old:
                if parse_json(line)["index"] not in dropped:
                    _write_all(copy, line)
        os.fsync(copy.fileno())
        shutil.copymode(path, draft)
        lock(copy, draft)
        draft.replace(path)
    except BaseException as error:
        copy.close()
        draft.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise WriteFailed(f"{path}: {error.strerror}; its answers are all there") from error
        raise
    file.close()
    return copy


def _write_all(file: io.FileIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def lock(file: io.FileIO, path: Path) -> None:
    """Released by the operating system when the process ends, however it ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another process may have put a new file there between our opening and our lock.
        if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise BlockingIOError
    except BlockingIOError as error:
        file.close()
        raise InvalidRequest(f"{path} is being written by another process") from error
    except OSError as error:
        file.close()
        raise InvalidRequest(f"{path} cannot be locked: {error.strerror}") from error
