"""A file of requests through the engine, and their records out as they finish."""

from __future__ import annotations

import itertools
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import typer

from w2s_fast.cli.asking import Asking, TemplateNote
from w2s_fast.cli.console import note, note_console
from w2s_fast.cli.growing import Growing
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
from w2s_fast.cli.lines import LongLine, read_lines
from w2s_fast.cli.output_file import OutputFile
from w2s_fast.cli.pace import Pace, clock
from w2s_fast.cli.parquet import ParquetOutput, parquet_lines
from w2s_fast.cli.paths import STANDARD_INPUT, is_parquet
from w2s_fast.params import SearchParams
from w2s_fast.result import SearchResult, Usage

if TYPE_CHECKING:
    from w2s_fast.stats import EngineStats

Write = Callable[[Record], None]
Lines: TypeAlias = Iterator[bytes | LongLine]


class Answers(Protocol):
    """What answers: an engine, or several of them elsewhere."""

    @property
    def tokenizer(self) -> Any: ...

    def stats(self) -> EngineStats: ...

    def as_completed(
        self, prompts: Iterable[Any], params: Iterable[SearchParams], *, at_once: int | None = None
    ) -> Iterator[tuple[int, SearchResult]]: ...


_STEP_TOKENS = 16  # at most, of a step of the search


@dataclass(frozen=True)
class Batch:
    """What is to be answered, and how.

    Attributes:
        input: of JSON lines, or of Parquet; ``STANDARD_INPUT`` is that.
        output: the same; None: standard output.
        params: of lines that set none. asking: how their texts are put.
        made_by: names what answers.
    """

    input: Path
    output: Path | None
    params: SearchParams
    asking: Asking
    made_by: MadeBy
    resume: bool = False
    retry_errors: bool = False

    @contextmanager
    def open(self) -> Iterator[Lines]:
        if self.input == STANDARD_INPUT:
            yield read_lines(sys.stdin.buffer)
        elif is_parquet(self.input):
            yield parquet_lines(self.input)
        else:
            with self.input.open("rb") as file:
                yield read_lines(file)

    def requests(self, lines: Lines) -> Iterator[Request | BadLine]:
        return read_requests(lines, self.params, self.made_by, self.asking)

    def lines(self) -> int | None:
        """How many there are to be answered; None: that is not known before they are read."""
        if self.input == STANDARD_INPUT:
            return None
        if not (is_parquet(self.input) or stat.S_ISREG(self.input.stat().st_mode)):
            return None
        with self.open() as lines:
            return sum(isinstance(line, LongLine) or bool(line.strip()) for line in lines)

    def open_output(self, path: Path) -> OutputFile | ParquetOutput:
        kind: type[OutputFile] | type[ParquetOutput]
        kind = ParquetOutput if is_parquet(path) else OutputFile
        # Of standard input nothing can be gone on with, so there is no output yet.
        if not self.resume or self.input == STANDARD_INPUT:
            return kind.create(path)
        with self.open() as lines:
            return kind.resume(path, self.requests(lines), self.made_by, self.retry_errors)


class Tally:
    """Writes records, counts them, and says how it goes."""

    def __init__(self, write: Write, engine: Answers, total: int | None) -> None:
        self._write = write
        self._total = total
        self.pace = Pace(engine.stats, total)
        self._begin = time.perf_counter()
        self.answered = self.failed = 0

    def add(self, record: Record) -> None:
        self._write(record)
        if "error" in record:
            self.failed += 1
            self.pace.failed()
        else:
            self.answered += 1
            self.pace.answered(Usage(**record["usage"]))

    def so_far(self) -> str:
        """While it goes on."""
        of_all = "" if self._total is None else f" of {self._total:,}"
        left = self.pace.seconds_left
        more = "" if left is None else f", about {clock(left)} left"
        return f"{self.answered:,}{of_all} answered, {self.failed:,} failed, {self._speed()}{more}"

    def at_the_end(self) -> str:
        seconds = time.perf_counter() - self._begin
        return f"{self.answered} answered, {self.failed} failed, {self._speed()}, {seconds:.1f} s"

    def _speed(self) -> str:
        return f"{self.pace.tokens_per_s:,.0f} tokens/s sampled"


def run_batch(load: Callable[[], Answers], batch: Batch) -> int:
    """Answers the input line by line, lazily; returns how many of its lines have no answer.

    A record is written and flushed when its request finishes, so whenever the process ends, the
    output holds all answers that were finished, and can be gone on with.

    Args:
        load: makes what answers, once both files are open and an earlier run is known to match.

    Raises:
        InvalidRequest: the output cannot be gone on with.
        WriteFailed: the disk is full, or the like.
    """
    if batch.output is None:
        with batch.open() as file:
            tally = _run(load(), batch, batch.requests(file), _write_stdout)
        note(tally.at_the_end(), style="yellow" if tally.failed else "dim")
        return tally.failed
    with batch.open() as file, batch.open_output(batch.output) as records:
        if records.cut_bytes:
            note(f"cut off a half-written last line ({records.cut_bytes} bytes)")
        if records.done:
            note(f"{len(records.done)} lines are in {batch.output} already")
        engine = load()
        requests = (each for each in batch.requests(file) if each.index not in records.done)
        try:
            tally = _run(engine, batch, requests, records.write, len(records.done))
        except KeyboardInterrupt:
            note(f"interrupted: {batch.output} holds what was finished; --resume goes on")
            raise typer.Exit(130) from None
    failed = tally.failed + records.failed_before
    style = "yellow" if failed else "dim"
    note(f"{tally.at_the_end()}; written to {batch.output}", style=style)
    if records.failed_before:
        note(f"{records.failed_before} lines failed earlier; --retry-errors tries them again")
    return failed


def _run(
    engine: Answers,
    batch: Batch,
    requests: Iterator[Request | BadLine],
    write: Write,
    done: int = 0,
) -> Tally:
    """``done``: lines of the input that are not among the requests."""
    # Only who looks at it need wait for a large file to be counted.
    lines = batch.lines() if note_console().is_terminal else None
    tally = Tally(write, engine, None if lines is None else lines - done)
    with Growing(None, note_console(), tally.so_far) as growing:
        template_note = TemplateNote(batch.asking, engine.tokenizer, growing.note)
        running: dict[int, Request] = {}

        def usable() -> Iterator[Request]:
            """The engine's supply. Bad lines are answered as they are met, and never enter."""
            order = itertools.count()
            for request in requests:
                if isinstance(request, BadLine):
                    tally.add(bad_line_record(request))
                else:
                    template_note.see(request.prompt)
                    tally.pace.expect(request.params)
                    running[next(order)] = request
                    yield request

        for_prompts, for_params = itertools.tee(usable())
        results = engine.as_completed(
            (request.for_engine for request in for_prompts),
            (request.params for request in for_params),
            at_once=at_once(engine, batch.params),
        )
        for position, result in results:
            tally.add(answer_record(running.pop(position), result))
    return tally


def at_once(engine: Answers, params: SearchParams) -> int:
    """How many requests begin before each step: so many that there is room for no more when the
    first ones end. All at once they would end at once, too, and nobody would see an answer before.
    """
    places = engine.stats().max_rows // params.rows
    steps = -(-params.max_new_tokens // min(params.tokens_per_round, _STEP_TOKENS))
    return max(1, -(-places // steps))


def _write_stdout(record: Record) -> None:
    sys.stdout.buffer.write(encode_record(record))
    sys.stdout.buffer.flush()
