"""Soak: tasks and threads over tiny pools, with aborts, bad requests, NaN and failing models.

``pytest tests/test_soak.py --soak-seconds 3600`` (or W2S_FAST_SOAK_SECONDS) runs it longer.
"""

from __future__ import annotations

import asyncio
import functools
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from typing import Any
from unittest import mock

import pytest

from tests.support.broken_models import broken_copy
from tests.support.engines import assert_all_pages_free, make_engine
from tests.support.tiny_models import VOCABULARY, Triple, tiny_triple
from w2s_fast import AsyncEngine, Engine, SearchParams, SearchResult, StreamPiece
from w2s_fast.errors import Aborted, EngineFailure, InvalidRequest, NumericalError
from w2s_fast.scheduling.runner import Runner
from w2s_fast.search.request import Request

BROKEN = 7  # the tuned model gives NaN for every text that goes on behind this token
KINDS = 48  # different requests
TASKS = 6
WANTED = {"equal", "aborted", "NaN", "failure", "refused", "closed", "streamed", "scored"}
Asked = tuple[list[int], SearchParams]


def models(instance: str) -> Triple:
    """Copies of their own: two engines in two threads must not share a model."""
    triple = tiny_triple(("llama", "llama", "llama"), eos=(0, 6), instance=instance)
    return triple._replace(tuned=broken_copy(triple.tuned, BROKEN, math.nan))


@functools.cache
def asked() -> list[Asked]:
    draw = random.Random(0)
    found: list[Asked] = []
    for seed in range(KINDS):
        usual = [token for token in range(VOCABULARY) if token != BROKEN]
        prompt = [draw.choice(usual) for _ in range(draw.randint(1, 12))]
        if seed % 12 == 0:
            prompt[0] = BROKEN
        method: Any = draw.choice(["cbs", "cbs", "cbs", "bon", "sample", "beam"])
        width = draw.randint(1, 3)
        params = SearchParams(
            method=method,
            beam_width=width,
            successors=draw.randint(3, 4),
            chunk_length=draw.choice([1, 2, 3, 5, 20]),
            max_new_tokens=draw.randint(1, 12) if method == "bon" else draw.randint(1, 30),
            top_k=draw.choice([0, 5]),
            top_p=draw.choice([0.8, 1.0]),
            seed=seed,
            n=width,
        )
        found.append((prompt, params))
    return found


def answers(result: SearchResult) -> list[list[int]]:
    return [h.token_ids for h in result.hypotheses]


@functools.cache
def alone() -> list[list[list[int]] | None]:
    """What each request finds by itself on a roomy engine; None: NaN."""
    e = make_engine(*models("roomy"))
    results = [e.generate([p], q, on_error="return")[0] for p, q in asked()]
    assert all(isinstance(r.error, NumericalError | None) for r in results)
    return [answers(r) if r.error is None else None for r in results]


class Watch:
    """Counts what the runner takes on and lets go, request by request."""

    def __init__(self) -> None:
        self.came: Counter[Request] = Counter()
        self.went: Counter[Request] = Counter()

    def patches(self) -> Iterable[Any]:
        submit, leave = Runner.submit, Runner._leave

        def submitted(runner: Runner, request: Request) -> None:
            self.came[request] += 1
            submit(runner, request)

        def left(runner: Runner, request: Request) -> None:
            self.went[request] += 1
            leave(runner, request)

        return mock.patch.object(Runner, "submit", submitted), mock.patch.object(
            Runner, "_leave", left
        )


class Soak:
    """One tight engine, and everybody who uses it."""

    def __init__(self, seconds: float) -> None:
        triple = models("tight")
        self.engine: Engine = make_engine(*triple, kv_cache_tokens=200, max_rows=40)
        self.begin = time.monotonic()
        self.seconds = seconds
        self.seen: Counter[str] = Counter()
        self.errors: list[BaseException] = []
        faults = random.Random(1)

        def fail(*_: Any) -> None:
            if faults.random() < 0.003:
                raise RuntimeError("injected")

        self.hooks = [model.get_input_embeddings().register_forward_hook(fail) for model in triple]

    @property
    def over(self) -> bool:
        """Long enough, and everything has happened that can; or something went wrong."""
        passed = time.monotonic() - self.begin
        done = set(self.seen) >= WANTED and self.engine.stats().set_aside > 0
        return bool(self.errors) or (passed > self.seconds and (done or passed > 300))

    def judge(self, i: int, result: SearchResult | BaseException) -> None:
        """A request has ended as it does alone, or with a failure that was brought about."""
        error = result.error if isinstance(result, SearchResult) else result
        if error is None:
            assert isinstance(result, SearchResult)
            assert answers(result) == alone()[i], f"request {i}"
            self.seen["equal"] += 1
        elif isinstance(error, NumericalError):
            assert alone()[i] is None, f"request {i}: {error}"
            self.seen["NaN"] += 1
        elif isinstance(error, EngineFailure):
            assert "injected" in str(error), f"request {i}: {error}"
            self.seen["failure"] += 1
        else:
            raise error

    def joined(self, pieces: list[StreamPiece]) -> SearchResult:
        result = pieces[-1].result
        assert result is not None
        assert [t for p in pieces for t in p.token_ids] == result.token_ids
        self.seen["streamed"] += 1
        return result

    # Tasks

    async def tasks(self) -> None:
        """Many tasks over an AsyncEngine that is closed and opened again from time to time."""
        draw = random.Random(2)
        while not self.over:
            engine = AsyncEngine(self.engine)
            users = [asyncio.create_task(self._user(engine, draw)) for _ in range(TASKS)]
            await asyncio.sleep(draw.uniform(0.5, 3.0))
            await engine.close()
            await asyncio.gather(*users)
        engine = AsyncEngine(self.engine)  # and after all that it still serves
        await asyncio.gather(*(self._ask(engine, draw, i) for i in range(KINDS)))
        await engine.close()

    async def _user(self, engine: AsyncEngine, draw: random.Random) -> None:
        while not self.over:
            await asyncio.sleep(draw.choice([0.0, 0.0, 0.05]))
            try:
                await self._ask(engine, draw, draw.randrange(KINDS))
            except Aborted:
                self.seen["closed"] += 1
                return

    async def _ask(self, engine: AsyncEngine, draw: random.Random, i: int) -> None:
        prompt, params = asked()[i]
        priority = draw.choice([0, 0, 0, -1, 1])
        kind = draw.random()
        try:
            if kind < 0.1:
                with pytest.raises(InvalidRequest):
                    await engine.generate([*prompt, VOCABULARY + 5], params)
                self.seen["refused"] += 1
            elif kind < 0.4:
                task = asyncio.create_task(engine.generate(prompt, params, priority=priority))
                await asyncio.wait([task], timeout=draw.choice([0.0, 0.01, 0.1]))
                task.cancel()
                await asyncio.wait([task])
                if not task.cancelled():
                    self.judge(i, task.exception() or task.result())
                self.seen["aborted"] += task.cancelled()
            elif kind < 0.6:
                pieces = [p async for p in engine.stream(prompt, params, priority=priority)]
                self.judge(i, self.joined(pieces))
            elif kind < 0.7:
                async for _ in engine.stream(prompt, params, priority=priority):
                    break
            else:
                self.judge(i, await engine.generate(prompt, params, priority=priority))
        except (NumericalError, EngineFailure) as error:
            self.judge(i, error)

    # Threads

    def thread(self, seed: int) -> None:
        """One caller of the engine itself."""
        draw = random.Random(seed)
        try:
            while not self.over:
                self._call(draw)
                time.sleep(draw.choice([0.0, 0.02]))
        except BaseException as error:
            self.errors.append(error)

    def _call(self, draw: random.Random) -> None:
        some = [draw.randrange(KINDS) for _ in range(draw.randint(1, 5))]
        prompts = [asked()[i][0] for i in some]
        params = [asked()[i][1] for i in some]
        kind = draw.random()
        if kind < 0.4:
            for i, result in zip(some, self.engine.generate(prompts, params, on_error="return")):
                self.judge(i, result)
        elif kind < 0.6:
            for index, result in self.engine.as_completed(prompts, params):
                self.judge(some[index], result)
                if draw.random() < 0.3:
                    break
        elif kind < 0.9:
            stream = self.engine.stream(prompts[0], params[0], priority=draw.choice([0, -1]))
            limit = draw.choice([1, 2, 1000])
            pieces: list[StreamPiece] = []
            try:
                while len(pieces) < limit and (piece := next(stream, None)) is not None:
                    pieces.append(piece)
                if pieces and pieces[-1].result is not None:
                    self.judge(some[0], self.joined(pieces))
            except (NumericalError, EngineFailure) as error:
                self.judge(some[0], error)
        else:
            with suppress(RuntimeError):  # injected
                (score,) = self.engine.score([[1, 2]], [[3, 4]])
                assert score == pytest.approx(self.score)
                self.seen["scored"] += 1

    @functools.cached_property
    def score(self) -> float:
        (score,) = make_engine(*models("roomy")).score([[1, 2]], [[3, 4]])
        return score


@pytest.mark.long
def test_soak(soak_seconds: float) -> None:
    """No lost request, no leaked page, no wrong neighbour."""
    alone()
    soak, watch = Soak(soak_seconds), Watch()
    assert math.isfinite(soak.score)
    submitted, left = watch.patches()
    with submitted, left:
        threads = [threading.Thread(target=soak.thread, args=(seed,)) for seed in (10, 11, 12)]
        for thread in threads:
            thread.start()
        try:
            asyncio.run(asyncio.wait_for(soak.tasks(), soak_seconds + 400))
        except BaseException as error:
            soak.errors.append(error)
        for thread in threads:
            thread.join(200)
    assert not any(thread.is_alive() for thread in threads)
    for error in soak.errors:
        raise error
    for hook in soak.hooks:
        hook.remove()
    stats = soak.engine.stats()
    print(f"\n{dict(soak.seen)}\n{stats}")
    assert set(watch.came) == set(watch.went)
    assert set(watch.came.values()) == set(watch.went.values()) == {1}
    assert all(request.ended for request in watch.came)
    assert stats.finished + stats.failed + stats.aborted == len(watch.came)
    assert (stats.waiting, stats.running) == (0, 0)
    assert_all_pages_free(soak.engine)
    assert set(soak.seen) >= WANTED
    assert stats.set_aside > 0
    results = soak.engine.generate(*zip(*asked()), on_error="return")  # type: ignore[arg-type]
    assert [answers(r) or None for r in results] == alone()
