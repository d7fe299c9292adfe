"""A task that is cancelled, a stream that is left, an engine that closes: nothing stays held."""

from __future__ import annotations

import asyncio
import gc
from dataclasses import replace
from typing import Any

import pytest

from tests.support.async_tasks import last, read, run, until
from tests.support.engines import (
    LONG,
    PROMPTS,
    SEARCH,
    assert_all_pages_free,
    engine,
    found,
    quiet,
    tiny_engine,
)
from w2s_fast import AsyncEngine, SearchResult
from w2s_fast.errors import Aborted


def test_a_cancelled_task_frees_its_pages_at_any_time() -> None:
    e = tiny_engine(eos=(), max_rows=6)

    async def main() -> None:
        async with AsyncEngine(e) as a:
            before_it_began = asyncio.create_task(a.generate([1], LONG))
            before_it_began.cancel()
            while_encoding = asyncio.create_task(a.generate([1], LONG))
            await asyncio.sleep(0)
            while_encoding.cancel()
            with e.runner.turn():
                arriving = asyncio.create_task(a.generate([1], LONG))
                await until(lambda: e.stats().waiting == 1)
                arriving.cancel()
                await asyncio.wait([arriving])
            running = asyncio.create_task(a.generate([1], LONG))
            waiting = asyncio.create_task(a.generate([2], LONG))
            await until(lambda: e.stats().running == 1 and e.stats().waiting == 1)
            waiting.cancel()
            running.cancel()
            tasks = [before_it_began, while_encoding, arriving, running, waiting]
            await asyncio.wait(tasks)
            assert all(task.cancelled() for task in tasks)
            await until(lambda: quiet(e))
            assert_all_pages_free(e)
            assert e.stats().finished == 0
            result = await a.generate(PROMPTS[0], SEARCH)
            assert found([result]) == found(engine(eos=()).generate(PROMPTS[:1], SEARCH))

    run(main())


@pytest.mark.parametrize("how", ["close", "leave", "cancel"])
def test_a_stream_that_is_left_frees_its_pages(how: str) -> None:
    e = tiny_engine(eos=())
    params = replace(LONG, beam_width=1, n=1)

    async def main() -> None:
        async with AsyncEngine(e) as a:
            stream = a.stream([1], params)
            if how == "close":
                await anext(stream)
                await stream.aclose()  # type: ignore[attr-defined]
            elif how == "leave":
                async for _ in stream:
                    break
                del stream
                gc.collect()
            else:
                task = asyncio.create_task(read(a, [1], params))
                await until(lambda: e.stats().running == 1)
                task.cancel()
            await until(lambda: quiet(e))
            assert_all_pages_free(e)

    run(main())
    assert e.stats().finished == 0


def test_a_stream_that_is_never_read_holds_nothing() -> None:
    e = tiny_engine()

    async def main() -> None:
        async with AsyncEngine(e) as a:
            stream = a.stream([1], LONG)
            await asyncio.sleep(0)
            await stream.aclose()  # type: ignore[attr-defined]

    run(main())
    assert e.stats().aborted == e.stats().finished == 0


def test_closing_ends_everything_under_way_and_takes_nothing_on() -> None:
    e = tiny_engine(eos=(), max_rows=6)
    iteration = e.as_completed(PROMPTS, LONG)  # somebody else's, on the same engine
    first = next(iteration)

    async def main() -> None:
        a = AsyncEngine(e)
        tasks = [asyncio.create_task(a.generate(p, LONG)) for p in PROMPTS]
        tasks += [asyncio.create_task(last(a, p)) for p in PROMPTS]
        await until(lambda: e.stats().waiting + e.stats().running >= 10)
        await asyncio.gather(a.close(), a.close())
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(r, Aborted) and "closed" in str(r) for r in done)
        assert len(set(map(id, done))) == len(done)  # nobody's traceback grows on another's
        with pytest.raises(Aborted, match="closed"):
            await a.generate([1], SEARCH)
        with pytest.raises(Aborted, match="closed"):
            await read(a, [1], SEARCH)
        await a.close()

    run(main())
    rest = dict([first, *iteration])
    assert found([rest[i] for i in range(5)]) == found(engine(eos=()).generate(PROMPTS, LONG))
    assert_all_pages_free(e)


def test_a_loop_that_was_closed_leaves_no_request_behind() -> None:
    e = tiny_engine(eos=())
    a = AsyncEngine(e)
    loop = asyncio.new_event_loop()

    async def begin() -> None:
        task = loop.create_task(a.generate([1], LONG))
        kept.append(task)
        await until(lambda: e.stats().waiting + e.stats().running == 1)

    kept: list[asyncio.Task[Any]] = []
    with e.runner.turn():
        loop.run_until_complete(begin())
        loop.close()  # and the task is never cancelled

    async def rest() -> SearchResult:
        result = await a.generate(PROMPTS[0], SEARCH)
        await until(lambda: quiet(e))
        await a.close()
        return result

    assert found([run(rest())]) == found(engine(eos=()).generate(PROMPTS[:1], SEARCH))
    assert_all_pages_free(e)
    kept[0]._log_destroy_pending = False  # type: ignore[attr-defined]
