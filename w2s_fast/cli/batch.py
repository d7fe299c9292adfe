"""A file of requests through the engine, and their records out as they finish."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from w2s_fast.cli.console import note, note_console
from w2s_fast.cli.jsonl import (
    BadLine,
    MadeBy,
    Record,
    Request,
    answer_record,
    bad_line_record,
    encode_record,
    read_requests,
)
from w2s_fast.cli.lines import read_lines
from w2s_fast.cli.output_file import OutputFile
from w2s_fast.params import SearchParams

if TYPE_CHECKING:
    from w2s_fast import Engine

Write = Callable[[Record], None]


class Tally:
    """Writes records and counts them."""

    def __init__(self, write: Write, progress: Progress) -> None:
        self._write = write
        self._progress = progress
        self._task = progress.add_task("", total=None)
        self._start = time.perf_counter()
        self.answered = self.failed = self.tokens = 0

    def add(self, record: Record) -> None:
        self._write(record)
        if "error" in record:
            self.failed += 1
        else:
            self.answered += 1
            self.tokens += record["usage"]["completion_tokens"]
        self._progress.update(self._task, description=str(self))

    def __str__(self) -> str:
        speed = self.tokens / (time.perf_counter() - self._start)
        return f"{self.answered} answered, {self.failed} failed, {speed:.0f} answer tokens/s"


def run_batch(
    load: Callable[[], Engine],
    made_by: MadeBy,
    params: SearchParams,
    input: Path,
    output: Path | None,
    resume: bool,
    retry_errors: bool,
) -> int:
    """Answers `input` line by line, lazily; returns how many of its lines have no answer.

    A record is written and flushed when its request finishes, so whenever the process ends, the
    output holds all answers that were finished, and can be gone on with.

    Args:
        load: makes the engine, once both files are open and an earlier run is known to match.

    Raises:
        InvalidRequest: the output cannot be gone on with.
        WriteFailed: the disk is full, or the like.
    """
    if output is None:
        with input.open("rb") as file:
            requests = read_requests(read_lines(file), params, made_by)
            tally = _run(load(), requests, _write_stdout)
        note(str(tally), style="yellow" if tally.failed else "dim")
        return tally.failed
    with (
        input.open("rb") as file,
        _open_output(input, output, resume, retry_errors, params, made_by) as records,
    ):
        if records.cut_bytes:
            note(f"cut off a half-written last line ({records.cut_bytes} bytes)")
        if records.done:
            note(f"{len(records.done)} lines are in {output} already")
        engine = load()
        requests = (
            request
            for request in read_requests(read_lines(file), params, made_by)
            if request.index not in records.done
        )
        try:
            tally = _run(engine, requests, records.write)
        except KeyboardInterrupt:
            note(f"interrupted: {output} holds what was finished; --resume goes on")
            raise typer.Exit(130) from None
    failed = tally.failed + records.failed_before
    note(f"{tally}; written to {output}", style="yellow" if failed else "dim")
    if records.failed_before:
        note(f"{records.failed_before} lines failed earlier; --retry-errors tries them again")
    return failed


def _open_output(
    input: Path,
    output: Path,
    resume: bool,
    retry_errors: bool,
    params: SearchParams,
    made_by: MadeBy,
) -> OutputFile:
    if not resume:
        return OutputFile.create(output)
    with input.open("rb") as file:
        requests = read_requests(read_lines(file), params, made_by)
        return OutputFile.resume(output, requests, made_by, retry_errors)


def _run(engine: Engine, requests: Iterator[Request | BadLine], write: Write) -> Tally:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    console = note_console()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as p:
        tally = Tally(write, p)
        running: dict[int, Request] = {}

        def usable() -> Iterator[Request]:
            """The engine's supply. Bad lines are answered as they are met, and never enter."""
            order = itertools.count()
            for request in requests:
                if isinstance(request, BadLine):
                    tally.add(bad_line_record(request))
                else:
                    running[next(order)] = request
                    yield request

        for_prompts, for_params = itertools.tee(usable())
        results = engine.as_completed(
            (request.for_engine for request in for_prompts),
            (request.params for request in for_params),
        )
        for position, result in results:
            tally.add(answer_record(running.pop(position), result))
    return tally


def _write_stdout(record: Record) -> None:
    sys.stdout.buffer.write(encode_record(record))
    sys.stdout.buffer.flush()
