"""Runs the methods of an evaluation over prompts; an interrupted run is gone on with."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from w2s_fast.cli.console import counting_bar, note, note_console
from w2s_fast.cli.jsonl import (
    MadeBy,
    Prompt,
    Record,
    Request,
    answer_record,
    fingerprint,
    parse_json,
)
from w2s_fast.cli.output_file import OutputFile
from w2s_fast.result import Candidate, Hypothesis, Round, SearchResult, Trace, Usage

if TYPE_CHECKING:
    from w2s_fast import Engine
    from w2s_fast.demo import Method

WARM_UP_TOKENS = 8


def requests_of(
    methods: Sequence[Method],
    prompts: Sequence[Prompt],
    seeds: int,
    seed: int,
    made_by: MadeBy,
    traced: str | None = None,
) -> dict[str, list[Request]]:
    """For each method a request for each prompt and seed; every method has the same seeds.

    They are numbered prompt by prompt, so that an earlier run over fewer prompts can be gone on
    with.

    Args:
        seeds: answers to each prompt. seed: what their seeds are drawn from. Prompts that shared
            one would share their noise, and the interval of their mean would be wrong.
        traced: the method whose first request is traced.
    """
    draw = random.Random(seed)
    drawn = [draw.getrandbits(64) for _ in range(len(prompts) * seeds)]
    found: dict[str, list[Request]] = {}
    for m, method in enumerate(methods):
        found[method.name] = own = []
        for each, own_seed in enumerate(drawn):
            place, repeat = divmod(each, seeds)
            trace = each == 0 and method.name == traced
            params = replace(method.params, seed=own_seed, trace=trace)
            name = f"{method.name}, prompt {place}, seed {repeat}"
            print_ = fingerprint(made_by, name, prompts[place], params)
            index = each * len(methods) + m
            own.append(Request(index, print_, name, made_by, prompts[place], params))
    return found


def answer_all(
    engine: Engine, requests: dict[str, list[Request]], made_by: MadeBy, path: Path, resume: bool
) -> dict[int, Record]:
    """Answers the requests of each method, one method after the other; records by index.

    A record has, beside what `generate` writes, the base's mean log-prob of the answer's tokens
    ("fluency"), and its share of the method's wall time ("seconds").

    Raises:
        InvalidRequest: the file at ``path`` is there and may not be gone on with.
        WriteFailed: the disk is full, or the like.
    """
    every = [request for own in requests.values() for request in own]
    if resume:
        file = OutputFile.resume(path, every, made_by, retry_errors=True)
    else:
        file = OutputFile.create(path)
    console = note_console()
    bars = counting_bar(console, 24, hidden=not console.is_terminal)
    with file as records, bars as progress:
        if records.done:
            note(f"{len(records.done)} of {len(every)} answers are in {path} already")
        for name, own in requests.items():
            rest = [request for request in own if request.index not in records.done]
            if not rest:
                continue
            bar = progress.add_task(name, total=len(own), completed=len(own) - len(rest))
            _warm_up(engine, rest[0])
            begin = last = time.perf_counter()
            results = engine.as_completed(
                [request.for_engine for request in rest], [request.params for request in rest]
            )
            for position, result in results:
                now = time.perf_counter()
                record = answer_record(rest[position], result)
                if result.error is None:
                    log_probs = result.hypotheses[0].token_logprobs
                    record["fluency"] = statistics.fmean(log_probs) if log_probs else None
                    record["seconds"] = now - last
                last = now
                records.write(record)
                progress.advance(bar)
            if not console.is_terminal:
                note(f"{name}: {len(rest)} answers in {last - begin:.1f} s")
    return {int(record["index"]): record for record in _read(path)}


def _read(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        for line in file:
            yield parse_json(line)


def _warm_up(engine: Engine, request: Request) -> None:
    """What is paid once is no part of the measurement."""
    tokens = min(WARM_UP_TOKENS, request.params.max_new_tokens)
    params = replace(request.params, max_new_tokens=tokens, min_new_tokens=0, trace=False)
    engine.generate([request.for_engine], params, on_error="return", progress=False)


def traced_result(record: Record) -> SearchResult:
    """A recorded answer with its trace, as a search tree is drawn from."""
    rounds = [
        Round([Candidate(**candidate) for candidate in each["candidates"]], each["kept"])
        for each in record["trace"]["rounds"]
    ]
    best = Hypothesis(
        record["text"], record["token_ids"], record["score"], record["finish_reason"], [], []
    )
    usage: dict[str, Any] = record["usage"]
    return SearchResult([best], Usage(**usage), Trace(rounds))
