"""Rounds of searches under way in an engine, and where their time goes: device, host, or waiting.

Requests are submitted, and measured once all of them run: prompts are not part of a round. The
device's time is told by CUDA events around the launches of decoding and of scoring, on the stream
that they go to. The host's is all that it does not wait for the device; on a CPU there is nobody to
wait for.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from bench.device_trace import Trace, trace
from w2s_fast import Engine, SearchParams
from w2s_fast.attention import Reading
from w2s_fast.search import Request

SETTLED = 2  # rounds of every request before the first that counts
SPARE = 2  # rounds that are still to come when the last has been measured
_PASS_TOKENS = 8192  # of prompts, in a step: an engine's default where memory is not tight
_WARM_UP = 2  # searches at most: a shape is recorded when it has come twice


@dataclass(frozen=True)
class Measured:
    """A round of all requests, on average; milliseconds.

    Attributes:
        ms: by the clock. decode_ms, scoring_ms: from the first launch of that part to the end of
            its last, on the device. host_ms: in which the host did not wait for the device.
        busy_ms: in which the device did anything, as traced in a round of its own; None: untraced.
        trace: of that round.
    """

    ms: float
    decode_ms: float
    scoring_ms: float
    host_ms: float
    busy_ms: float | None
    trace: Trace | None


class Spans:
    """Time of a device between the begin and the end of some calls."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._found: list[tuple[Any, Any]] = []

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, whose launches are timed on the current stream."""

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            begin = self._now()
            try:
                return function(*args, **kwargs)
            finally:
                self._found.append((begin, self._now()))

        return run

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def take_ms(self) -> float:
        """Of all calls since this was asked last. On CUDA all of them are over."""
        found, self._found = self._found, []
        if self._cuda:
            return float(sum(begin.elapsed_time(end) for begin, end in found))
        return float(sum(1e3 * (end - begin) for begin, end in found))


class HostWaits:
    """Seconds in which the host waits for what it reads."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, wait: Callable[..., Any]) -> Callable[..., Any]:
        def waited(reading: Reading) -> Any:
            begin = time.perf_counter()
            try:
                return wait(reading)
            finally:
                self.seconds += time.perf_counter() - begin

        return waited


def rounds_needed(requests: int, prompt: int, rounds: int, traced: int = 1) -> int:
    """Rounds that each of these requests has to have for ``rounds`` of them to be measured.

    Prompts of ``prompt`` tokens enter in several steps: those that came first are ahead then.
    """
    ahead = -(-requests * prompt // _PASS_TOKENS)
    return SETTLED + ahead + rounds + traced + SPARE


def synchronize(device: torch.device) -> None:
    """Wait for everything that was launched there."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def recordings(engine: Engine) -> int:
    """How many passes have been recorded."""
    return sum(len(own) for model in engine._search.models for own in model.recorded)


def warm_up(engine: Engine, prompts: list[list[int]], params: SearchParams) -> None:
    """Search until nothing is recorded any more; at most twice."""
    for _ in range(_WARM_UP):
        before = recordings(engine)
        engine.generate(prompts, params, progress=False)
        if recordings(engine) == before:
            return


def measure(
    engine: Engine, prompts: Sequence[list[int]], params: SearchParams, rounds: int, traced: int = 1
) -> Measured:
    """Rounds of these requests, all of them at once, in an engine that nobody else uses.

    Args:
        params: with tokens for :func:`rounds_needed`; with fewer, fewer rounds are timed.
        rounds: that are timed. traced: rounds to be traced, after those; 0: none.

    Raises:
        RuntimeError: no round is left to be timed when all requests run.
    """
    runner, device = engine.runner, engine.base.device
    own = [engine.make_request(prompt, params) for prompt in prompts]

    def done() -> int:
        return sum(request.stats.rounds for request in own)

    def advance_by(count: int) -> None:
        end = done() + count * len(own)
        while done() < end:
            _advance(engine, own)

    for request in own:
        runner.submit(request)
    try:
        while min(request.stats.rounds for request in own) < SETTLED:
            _advance(engine, own)
        ended = -(-params.max_new_tokens // params.tokens_per_round)
        left = ended - max(request.stats.rounds for request in own) - traced - 1
        rounds = min(rounds, left)
        if rounds < 1:
            raise _too_short(own)
        decoding, scoring, waits = Spans(device), Spans(device), HostWaits()
        search = engine._search
        with ExitStack() as patches:
            for owner, name, around in (
                (search.base, "draw", decoding.around),
                (search.guides, "score", scoring.around),
                (Reading, "wait", waits.around),
            ):
                timed = mock.patch.object(owner, name, around(getattr(owner, name)))
                patches.enter_context(timed)
            synchronize(device)
            before, begin = done(), time.perf_counter()
            advance_by(rounds)
            synchronize(device)
            seconds = time.perf_counter() - begin
        # With several cohorts some may have gone further than others.
        per_round = len(own) / (done() - before)
        found, busy = None, None
        if traced:
            before = done()
            found = trace(lambda: advance_by(traced), device)
            busy = found.busy / 1e3 * len(own) / (done() - before)
        return Measured(
            1e3 * seconds * per_round,
            decoding.take_ms() * per_round,
            scoring.take_ms() * per_round,
            1e3 * (seconds - waits.seconds) * per_round,
            busy,
            found,
        )
    finally:
        for request in own:
            runner.give_up(request)
        runner.settle()


def _advance(engine: Engine, own: Sequence[Request]) -> None:
    engine.runner.advance(own)
    for request in own:
        if request.error is not None:
            raise request.error
        if request.ended:
            raise _too_short(own)


def _too_short(own: Sequence[Request]) -> RuntimeError:
    return RuntimeError(f"the first of {len(own)} requests end before the last ones run")
