"""Parquet in and out: rows that say what lines of JSON say, and an output of whole files.

A Parquet file can be read only when it is closed. So an output is a folder, as other tools have
data sets, to which a file is added whenever there is enough for one, or enough time has passed.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from w2s_fast.cli.answered import Answer, check_same_makers, check_same_run
from w2s_fast.cli.jsonl import BadLine, MadeBy, Record, Request
from w2s_fast.cli.output_file import lock
from w2s_fast.cli.paths import already_there
from w2s_fast.errors import InvalidRequest, WriteFailed

_ROWS = 1000  # of a file at most
_SECONDS = 10.0  # that a record waits for others
_LOCK = ".lock"  # readers pass over names that begin so
_READ = ("index", "fingerprint", "error", "made_by")


def parquet_lines(path: Path) -> Iterator[bytes]:
    """The rows of a file, or of a folder of them, as lines of JSON; null is as if not there.

    Raises:
        InvalidRequest: pyarrow is not installed, or it is no Parquet.
    """
    _check_pyarrow()
    import pyarrow as pa
    import pyarrow.dataset as ds

    try:
        for batch in ds.dataset(path, format="parquet").to_batches():
            for row in batch.to_pylist():
                given = {name: value for name, value in row.items() if value is not None}
                # What JSON has no word for is told as text, and refused where it means something.
                yield json.dumps(given, default=str).encode()
    except pa.ArrowInvalid as error:
        raise InvalidRequest(f"{path} is no Parquet: {error}") from error


class ParquetOutput:
    """A folder that only ever grows by whole files, held by one process at a time.

    Attributes: as of :class:`w2s_fast.cli.output_file.OutputFile`.
    """

    def __init__(
        self,
        path: Path,
        held: io.FileIO,
        done: frozenset[int] = frozenset(),
        failed_before: int = 0,
        cut_bytes: int = 0,
    ) -> None:
        self._path = path
        self._held = held
        self._waiting: list[Record] = []
        self._since = time.monotonic()
        self.done = done
        self.failed_before = failed_before
        self.cut_bytes = cut_bytes

    @classmethod
    def create(cls, path: Path) -> ParquetOutput:
        """A new folder. InvalidRequest if it exists."""
        _check_pyarrow()
        try:
            path.mkdir()
        except FileExistsError as error:
            raise already_there(path) from error
        return cls(path, _hold(path))

    @classmethod
    def resume(
        cls,
        path: Path,
        requests: Iterable[Request | BadLine],
        made_by: MadeBy,
        retry_errors: bool = False,
    ) -> ParquetOutput:
        """An existing folder to go on with, or a new one. Arguments and errors are those of
        :meth:`w2s_fast.cli.output_file.OutputFile.resume`."""
        if not path.exists():
            return cls.create(path)
        _check_pyarrow()
        held = _hold(path)
        try:
            answers, cut_bytes = {}, 0
            for half in path.glob("*.part"):  # a crash left it
                cut_bytes += half.stat().st_size
            for file in _files(path):
                for row in _rows(file):
                    check_same_makers(dict(row["made_by"] or ()) or None, made_by, path)
                    bad = row["error"] is not None
                    answers[int(row["index"])] = Answer(str(row["fingerprint"]), bad)
            check_same_run(answers, requests)
            for half in path.glob("*.part"):
                half.unlink()
            failed = {index for index, answer in answers.items() if answer.failed}
            if retry_errors and failed:
                for file in _files(path):
                    _drop_errors(file)
                answers = {index: a for index, a in answers.items() if not a.failed}
                failed = set()
        except BaseException:
            held.close()
            raise
        return cls(path, held, frozenset(answers), len(failed), cut_bytes)

    def write(self, record: Record) -> None:
        """Keeps a record until there is a file to be written. WriteFailed: the disk is full."""
        if not self._waiting:
            self._since = time.monotonic()
        self._waiting.append(record)
        if len(self._waiting) >= _ROWS or time.monotonic() - self._since > _SECONDS:
            self._flush()

    def __enter__(self) -> ParquetOutput:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if not isinstance(error, WriteFailed):
                self._flush()
        finally:
            self._held.close()
            if error is not None and not _files(self._path):
                with suppress(OSError):  # it would be in the way of the next attempt
                    (self._path / _LOCK).unlink()
                    self._path.rmdir()

    def _flush(self) -> None:
        if not self._waiting:
            return
        number = max((int(file.stem.rpartition("-")[2]) for file in _files(self._path)), default=-1)
        _write(self._path / f"answers-{number + 1:06}.parquet", map(_row, self._waiting))
        self._waiting = []


def _check_pyarrow() -> None:
    try:
        import pyarrow  # noqa: F401
    except ModuleNotFoundError:
        raise InvalidRequest("Parquet needs pyarrow; pip install pyarrow") from None


def _hold(path: Path) -> io.FileIO:
    held = io.FileIO(path / _LOCK, "ab")
    lock(held, path / _LOCK)
    return held


def _files(path: Path) -> list[Path]:
    return sorted(path.glob("answers-*.parquet"))


def _rows(file: Path) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        found: list[dict[str, Any]] = pq.read_table(file, columns=list(_READ)).to_pylist()
    except (pa.ArrowInvalid, KeyError) as error:
        raise InvalidRequest(f"cannot resume: {file} is no output of w2s-fast") from error
    if found and set(found[0]) != set(_READ):
        raise InvalidRequest(f"cannot resume: {file} is no output of w2s-fast")
    return found


def _drop_errors(file: Path) -> None:
    import pyarrow.parquet as pq

    rows = pq.read_table(file).to_pylist()
    kept = [row for row in rows if row["error"] is None]
    if not kept:
        file.unlink()
    elif len(kept) < len(rows):
        _write(file, kept)


def _write(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """In one step, so that whoever reads the folder finds whole files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    part = file.with_name(f".{file.name}.part")
    try:
        pq.write_table(pa.Table.from_pylist(list(rows), _schema()), part)
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.replace(file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise WriteFailed(
            f"{file}: {error.strerror or error}; what was written before is whole, and --resume "
            "goes on with it"
        ) from error


def _schema() -> Any:
    import pyarrow as pa

    hypothesis = [
        ("text", pa.string()),
        ("token_ids", pa.list_(pa.int64())),
        ("score", pa.float64()),
        ("finish_reason", pa.string()),
    ]
    usage = ("prompt_tokens", "completion_tokens", "sampled_tokens", "scored_tokens")
    return pa.schema(
        [
            ("index", pa.int64()),
            ("id", pa.string()),
            *hypothesis,
            ("hypotheses", pa.list_(pa.struct(hypothesis))),
            ("usage", pa.struct([(name, pa.int64()) for name in usage])),
            ("error", pa.struct([("type", pa.string()), ("message", pa.string())])),
            ("trace", pa.string()),
            ("fingerprint", pa.string()),
            ("made_by", pa.map_(pa.string(), pa.string())),
        ]
    )


def _row(record: Record) -> dict[str, Any]:
    """Ids that are no strings, and trees, are told as JSON."""
    row = dict(record)
    for name in ("id", "trace"):
        value = row.get(name)
        if value is not None and not isinstance(value, str):
            row[name] = json.dumps(value)
    row["made_by"] = list(record["made_by"].items())
    return row
