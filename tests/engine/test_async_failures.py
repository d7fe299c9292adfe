"""What fails under an AsyncEngine ends those it touches with an error, and nobody else."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from tests.support.async_tasks import last, run, until
from tests.support.broken_models import broken_copy, failing
from tests.support.engines import (
    LONG,
    PROMPTS,
    SEARCH,
    assert_all_pages_free,
    engine,
    found,
    make_engine,
    quiet,
    tiny_engine,
)
from tests.support.tiny_models import tiny_triple
from w2s_fast import AsyncEngine
from w2s_fast.errors import EngineFailure, NumericalError
from w2s_fast.scheduling.scheduler import Scheduler
from w2s_fast.search.search import Search


def test_nan_in_one_request_harms_no_other() -> None:
    triple = tiny_triple(("llama", "llama", "llama"), eos=(), dtype=torch.float32)
    base, tuned, untuned = triple
    e = make_engine(base, broken_copy(tuned, 7, math.nan), untuned)
    prompts = [[i, 3] for i in range(12)]
    params = replace(SEARCH, chunk_length=2, max_new_tokens=6)

    async def main() -> list[Any]:
        async with AsyncEngine(e) as a:
            tasks = [a.generate(p, params) for p in prompts]
            return await asyncio.gather(*tasks, return_exceptions=True)

    outcome = run(main())
    assert isinstance(outcome[7], NumericalError)
    expected = e.generate(prompts, params, on_error="return")
    assert sum(r.error is None for r in expected) >= 3
    for one, other in zip(outcome, expected):
        if other.error is None:
            assert found([one]) == found([other])
        else:
            assert str(one) == str(other.error)
    assert_all_pages_free(e)


@pytest.mark.parametrize("kind", [RuntimeError, MemoryError])
def test_a_model_that_fails_ends_the_step_and_not_the_engine(kind: type[Exception]) -> None:
    triple = tiny_triple(eos=())
    e = make_engine(*triple, max_rows=12)

    async def main() -> list[Any]:
        async with AsyncEngine(e) as a:
            with e.runner.turn():
                tasks = [asyncio.create_task(a.generate(p, SEARCH)) for p in PROMPTS]
                await until(lambda: e.stats().waiting == 5)
            outcome: list[Any] = await asyncio.gather(*tasks, return_exceptions=True)
            return [*outcome, *await asyncio.gather(*(a.generate(p, SEARCH) for p in PROMPTS))]

    with failing(triple.base, 3, kind("for the test")):
        outcome = run(main())
    failed = [r for r in outcome if isinstance(r, EngineFailure)]
    assert len(failed) == 2  # those that ran together; the other three waited
    assert len(set(map(id, failed))) == 2
    expected = engine(eos=()).generate(PROMPTS, SEARCH)
    for one, other in zip(outcome, expected * 2):
        assert isinstance(one, EngineFailure) or found([one]) == found([other])
    assert_all_pages_free(e)


@pytest.mark.parametrize("where", ["a model", "the scheduler"])
def test_when_the_thread_dies_everybody_gets_an_error(where: str) -> None:
    e = tiny_engine(eos=())
    place = (Search, "step") if where == "a model" else (Scheduler, "choose")

    async def main() -> None:
        a = AsyncEngine(e)
        with e.runner.turn():
            tasks = [asyncio.create_task(a.generate(p, LONG)) for p in PROMPTS]
            tasks += [asyncio.create_task(last(a, p)) for p in PROMPTS]
            await until(lambda: e.stats().waiting == 10)
            patched = mock.patch.object(*place, side_effect=SystemExit("for the test"))
            patched.start()
        outcome = await asyncio.gather(*tasks, return_exceptions=True)
        patched.stop()
        assert all(isinstance(r, EngineFailure) for r in outcome)
        with pytest.raises(EngineFailure, match="thread"):
            await a.generate([1], SEARCH)
        await a.close()

    run(main())
    assert_all_pages_free(e)
    assert quiet(e)
    assert found(e.generate(PROMPTS, SEARCH)) == found(engine(eos=()).generate(PROMPTS, SEARCH))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_everybody_gets_an_error_even_if_nothing_can_be_cleaned_up() -> None:
    e = tiny_engine(eos=(), max_rows=6)

    async def main() -> None:
        a = AsyncEngine(e)
        with e.runner.turn():
            tasks = [asyncio.create_task(a.generate(p, LONG)) for p in PROMPTS]
            await until(lambda: e.stats().waiting == 5)
            step = mock.patch.object(Search, "step", side_effect=RuntimeError("a bad page"))
            abort = mock.patch.object(Search, "abort", side_effect=SystemExit)
            step.start()
            abort.start()
        outcome = await asyncio.gather(*tasks, return_exceptions=True)
        await a.close()
        step.stop()
        abort.stop()
        assert all(isinstance(r, EngineFailure) for r in outcome)

    run(main())
