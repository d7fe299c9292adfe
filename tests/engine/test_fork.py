"""A child by os.fork is told at once that the parent's engine is not its own."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from tests.support.async_tasks import read, run, until
from tests.support.engines import (
    PROMPTS,
    SEARCH,
    assert_all_pages_free,
    engine,
    found,
    quiet,
    tiny_engine,
)
from w2s_fast import AsyncEngine, Engine, SearchResult
from w2s_fast.errors import EngineFailure

PATIENCE = 20  # seconds for a child that should need none

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no os.fork here")


def in_child(work: Callable[[], None]) -> bool:
    """Whether `work` came through, in a forked child, in time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python, too, warns of other threads
        child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status == 0
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def refused(ask: Callable[[], object]) -> None:
    with pytest.raises(EngineFailure, match=r"make an engine in the child, .* 'spawn'"):
        ask()


def held_by_a_thread(e: Engine, work: Callable[[], bool]) -> bool:
    """What `work` gives while another thread holds every lock of the engine."""
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with e.runner.turn(), e._intake._encoding, e.runner._next_turn:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        return work()
    finally:
        done.set()
        thread.join()


def test_every_way_to_ask_an_engine_raises_in_a_child() -> None:
    e = tiny_engine(eos=())
    prompts, params = PROMPTS[:2], [replace(SEARCH, max_new_tokens=3), SEARCH]
    results, stream = e.as_completed(prompts, params), e.stream([1], SEARCH)
    first, piece = next(results), next(stream)

    def child() -> None:
        refused(lambda: e.generate(PROMPTS, SEARCH))
        refused(lambda: e.generate(PROMPTS, SEARCH, on_error="return"))
        refused(lambda: e.generate([]))
        refused(lambda: next(e.as_completed([[1]])))
        refused(lambda: e.stream([1]))
        refused(lambda: e.score([[1]], [[2]]))
        refused(lambda: next(results))
        refused(lambda: next(stream))
        refused(lambda: AsyncEngine(e))
        assert e.stats().waiting + e.stats().running > 0  # those of the parent, as they were

    assert held_by_a_thread(e, lambda: in_child(child))
    rest = dict([first, *results])  # and the parent never learns of it
    assert found([rest[0], rest[1]]) == found(engine(eos=()).generate(prompts, params))
    last = [piece, *stream][-1].result
    assert last is not None
    assert found([last]) == found(engine(eos=()).generate([[1]], SEARCH))
    assert_all_pages_free(e)


def test_an_async_engine_raises_in_a_child_and_serves_its_own_process() -> None:
    e = tiny_engine(eos=())
    a = AsyncEngine(e)

    async def main() -> SearchResult:
        task = asyncio.create_task(a.generate(PROMPTS[0], SEARCH))
        await until(lambda: e.stats().running == 1 or task.done())
        with a._lock:  # as the engine's thread may at that moment
            assert await asyncio.to_thread(in_child, child)
        return await task

    def child() -> None:
        refused(lambda: run(a.generate([1], SEARCH)))
        refused(lambda: run(read(a, [1], SEARCH)))
        run(a.close())
        run(a.close())

    assert found([run(main())]) == found(engine(eos=()).generate(PROMPTS[:1], SEARCH))
    run(a.close())
    assert quiet(e)


def test_a_child_may_make_an_engine_of_its_own() -> None:
    e = engine(eos=())
    expected = found(e.generate(PROMPTS[:1], SEARCH))

    def child() -> None:
        async def main() -> SearchResult:
            async with AsyncEngine(tiny_engine(eos=())) as a:
                return await a.generate(PROMPTS[0], SEARCH)

        assert found([run(main())]) == expected

    assert in_child(child)


def test_a_thread_that_is_gone_without_a_word_is_no_reason_to_wait() -> None:
    a = AsyncEngine(tiny_engine())
    run(a.close())
    a._end = None  # as if it had not come to say so

    with pytest.raises(EngineFailure, match="thread has ended"):
        run(a.generate([1], SEARCH))


def test_where_no_threads_are_lent_any_more_nothing_is_taken_on() -> None:
    """So it is while the interpreter shuts down."""
    e = tiny_engine()

    async def main() -> None:
        pool = ThreadPoolExecutor()
        pool.shutdown()
        asyncio.get_running_loop().set_default_executor(pool)
        async with AsyncEngine(e) as a:
            with pytest.raises(EngineFailure, match="cannot schedule new futures"):
                await a.generate([1], SEARCH)
            with pytest.raises(EngineFailure, match="cannot schedule new futures"):
                await read(a, [1], SEARCH)

    run(main())
    assert quiet(e)
