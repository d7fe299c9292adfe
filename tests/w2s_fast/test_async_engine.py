"""AsyncEngine: many tasks, one engine; nobody waits for nothing, and nobody is harmed."""

from __future__ import annotations

import asyncio
import gc
import math
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, TypeVar
from unittest import mock

import pytest
import torch

from tests.tiny_models import byte_tokenizer, tiny_triple
from tests.w2s_fast.engines import (
    MIXED,
    PROMPTS,
    SEARCH,
    assert_all_pages_free,
    engine,
    found,
    make_engine,
)
from tests.w2s_fast.test_broken_numbers import broken_copy
from w2s_fast import AsyncEngine, Engine, SearchParams, SearchResult, StreamPiece
from w2s_fast.errors import Aborted, EngineFailure, InvalidRequest, NumericalError
from w2s_fast.request import Request
from w2s_fast.runner import Runner
from w2s_fast.scheduler import Scheduler
from w2s_fast.search import Search

T = TypeVar("T")
PATIENCE = 60  # seconds; only a broken engine needs them
LONG = replace(SEARCH, max_new_tokens=60)


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    async def bounded() -> T:
        return await asyncio.wait_for(coroutine, PATIENCE)

    return asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def tiny_engine(eos: tuple[int, ...] = (0, 6, 13), **options: Any) -> Engine:
    return make_engine(*tiny_triple(eos=eos), **options)


def quiet(e: Engine) -> bool:
    stats = e.stats()
    return stats.waiting == stats.running == 0


async def read(a: AsyncEngine, *args: Any, **options: Any) -> list[StreamPiece]:
    return [piece async for piece in a.stream(*args, **options)]


def test_many_tasks_find_what_the_engine_finds() -> None:
    e = tiny_engine()
    prompts = [p for p in PROMPTS for _ in MIXED]
    params = [replace(m, seed=i) for i, m in enumerate(MIXED * len(PROMPTS))]

    async def main() -> tuple[list[SearchResult], list[list[StreamPiece]]]:
        async with AsyncEngine(e) as a:
            results = asyncio.gather(*(a.generate(p, q) for p, q in zip(prompts, params)))
            pieces = asyncio.gather(*(read(a, p, q) for p, q in zip(prompts, params)))
            return await results, await pieces

    results, streams = run(main())
    expected = engine().generate(prompts, params)
    assert found(results) == found(expected)
    for pieces, one in zip(streams, expected):
        assert [p.result is None for p in pieces] == [True] * (len(pieces) - 1) + [False]
        assert [t for p in pieces for t in p.token_ids] == one.token_ids
    assert_all_pages_free(e)


def test_text_comes_before_the_end() -> None:
    e = make_engine(*tiny_triple(vocab_size=258, eos=(257,), bos=256), tokenizer=byte_tokenizer())
    params = SearchParams(method="sample", max_new_tokens=60, ignore_eos=True)

    async def main() -> None:
        async with AsyncEngine(e) as a:
            stream = a.stream("A", params)
            first = await anext(stream)
            assert first.text
            assert first.result is None
            rest = [piece async for piece in stream]
        (expected,) = e.generate(["A"], params)
        assert "".join(p.text or "" for p in [first, *rest]) == expected.text

    run(main())


def test_an_engine_can_be_made_from_models() -> None:
    async def main() -> None:
        models = tiny_triple()
        async with AsyncEngine(models.base, device="cpu", kv_cache_tokens=512) as a:
            params = SearchParams(method="sample", max_new_tokens=4)
            result = await a.generate([1, 2], params)
            assert found([result]) == found(a.engine.generate([[1, 2]], params))
            assert a.stats().finished == 2

    run(main())


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
        tasks += [asyncio.create_task(_last(a, p)) for p in PROMPTS]
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


async def _last(a: AsyncEngine, prompt: list[int]) -> StreamPiece:
    return (await read(a, prompt, LONG))[-1]


def test_bad_requests_are_refused_and_the_others_run() -> None:
    e = tiny_engine()

    async def main() -> list[Any]:
        async with AsyncEngine(e) as a:
            bad = [a.generate([99]), a.generate("text"), a.generate([1], 5)]  # type: ignore[arg-type]
            bad += [a.generate([1], priority=p) for p in (0.5, None, "1", True)]  # type: ignore[arg-type]
            good = [a.generate(p, SEARCH) for p in PROMPTS]
            return await asyncio.gather(*bad, *good, return_exceptions=True)

    outcome = run(main())
    assert all(isinstance(error, InvalidRequest) for error in outcome[:7])
    assert found(outcome[7:]) == found(engine().generate(PROMPTS, SEARCH))
    assert_all_pages_free(e)


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
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise kind("for the test")

    async def main() -> list[Any]:
        async with AsyncEngine(e) as a:
            with e.runner.turn():
                tasks = [asyncio.create_task(a.generate(p, SEARCH)) for p in PROMPTS]
                await until(lambda: e.stats().waiting == 5)
            outcome: list[Any] = await asyncio.gather(*tasks, return_exceptions=True)
            return [*outcome, *await asyncio.gather(*(a.generate(p, SEARCH) for p in PROMPTS))]

    handle = triple.base.get_input_embeddings().register_forward_hook(fail)
    try:
        outcome = run(main())
    finally:
        handle.remove()
    failed = [r for r in outcome if isinstance(r, EngineFailure)]
    assert len(failed) == 2  # those that ran together; the other three waited
    assert len(set(map(id, failed))) == 2
    expected = engine(eos=()).generate(PROMPTS, SEARCH)
    for one, other in zip(outcome, expected * 2):
        assert isinstance(one, EngineFailure) or found([one]) == found([other])
    assert_all_pages_free(e)


def test_a_request_that_comes_when_the_thread_goes_to_sleep_wakes_it() -> None:
    e = tiny_engine()

    async def main() -> list[SearchResult]:
        loop = asyncio.get_running_loop()
        second: list[Any] = []
        async with AsyncEngine(e) as a:
            look = a._under_way

            def looking() -> bool:
                some = look()
                if not some and not second:  # it has seen that there is nothing left to do
                    ask = a.generate(PROMPTS[1], SEARCH)
                    second.append(asyncio.run_coroutine_threadsafe(ask, loop))
                    while not a._work.is_set():
                        pass
                return some

            with mock.patch.object(a, "_under_way", looking):
                first = await a.generate(PROMPTS[0], SEARCH)
                await until(lambda: bool(second))
                return [first, await asyncio.wrap_future(second[0])]

    assert found(run(main())) == found(engine().generate(PROMPTS[:2], SEARCH))


@pytest.mark.parametrize("where", ["a model", "the scheduler"])
def test_when_the_thread_dies_everybody_gets_an_error(where: str) -> None:
    e = tiny_engine(eos=())
    place = (Search, "step") if where == "a model" else (Scheduler, "choose")

    async def main() -> None:
        a = AsyncEngine(e)
        with e.runner.turn():
            tasks = [asyncio.create_task(a.generate(p, LONG)) for p in PROMPTS]
            tasks += [asyncio.create_task(_last(a, p)) for p in PROMPTS]
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


def test_who_has_priority_comes_first() -> None:
    e = tiny_engine(eos=(), max_rows=1)
    ended: list[int] = []

    async def one(a: AsyncEngine, name: int, priority: int) -> None:
        await a.generate(PROMPTS[name], replace(SEARCH, seed=name), priority=priority)
        ended.append(name)

    async def main() -> None:
        async with AsyncEngine(e) as a:
            with e.runner.turn():
                tasks = []
                for name, priority in enumerate([1, 0, 2, -1, 0]):
                    tasks.append(asyncio.create_task(one(a, name, priority)))
                    await until(lambda: e.stats().waiting == len(tasks))
            await asyncio.gather(*tasks)

    run(main())
    assert ended == [3, 1, 4, 0, 2]


def test_tasks_of_two_loops_and_synchronous_callers_share_an_engine() -> None:
    e = tiny_engine(kv_cache_tokens=600)
    a = AsyncEngine(e)
    outcome: dict[int, list[SearchResult]] = {}
    params = [replace(p, max_new_tokens=30, n=1) for p in MIXED]

    async def asks() -> list[SearchResult]:
        return await asyncio.gather(*(a.generate(p, q) for p, q in zip(PROMPTS, params)))

    def asynchronous(i: int) -> None:
        outcome[i] = run(asks())

    def synchronous(i: int) -> None:
        outcome[i] = e.generate(PROMPTS, params)

    def scores(i: int) -> None:
        assert e.score([[1, 2]], [[3, 4]])

    kinds = [asynchronous, asynchronous, synchronous, synchronous, scores]
    threads = [threading.Thread(target=kind, args=(i,)) for i, kind in enumerate(kinds)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    expected = found(engine().generate(PROMPTS, params))
    assert [found(outcome[i]) for i in range(4)] == [expected] * 4
    run(a.close())
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


def test_a_listener_that_fails_ends_its_own_request() -> None:
    e = tiny_engine(eos=())
    broken = e.make_request([1], LONG)
    broken.listener = mock.Mock(side_effect=RuntimeError("for the test"))
    e.runner.submit(broken)
    assert found(e.generate(PROMPTS, SEARCH)) == found(engine(eos=()).generate(PROMPTS, SEARCH))
    assert isinstance(broken.error, EngineFailure)
    assert broken.ended
    assert broken.listener is None
    assert_all_pages_free(e)


def test_an_interrupt_of_one_caller_leaves_nobody_waiting() -> None:
    e = tiny_engine(eos=(), max_rows=12)
    others = [e.make_request(prompt, LONG) for prompt in PROMPTS[:2]]
    for request in others:
        request.listener = mock.Mock()
        e.runner.submit(request)
    interrupted = mock.patch.object(Search, "step", side_effect=KeyboardInterrupt)
    with interrupted, pytest.raises(KeyboardInterrupt):
        e.generate(PROMPTS, SEARCH)
    for request in others:
        assert request.ended
        assert isinstance(request.error, EngineFailure)
        assert request.listener is not None
        request.listener.assert_called_once_with()  # type: ignore[attr-defined]
    assert quiet(e)
    assert_all_pages_free(e)
    assert found(e.generate(PROMPTS, SEARCH)) == found(engine(eos=()).generate(PROMPTS, SEARCH))


def test_a_request_may_be_given_up_before_it_was_seen() -> None:
    e = tiny_engine(eos=())
    request = e.make_request([1], LONG)
    e.runner.submit(request)
    e.runner.give_up(request)
    e.runner.give_up(request)
    e.runner.settle()
    assert request.ended
    assert isinstance(request.error, Aborted)
    assert e.stats().aborted == 1
    assert quiet(e)


def test_a_request_may_come_and_go_while_a_step_begins() -> None:
    """Just when all arrivals have been taken in, and before what was given up is looked at."""
    e = tiny_engine(eos=())
    request = e.make_request([1], LONG)

    class Arrivals(deque[Request]):
        def __bool__(self) -> bool:
            some = len(self) > 0
            if not some and request.listener is None:
                request.listener = lambda: None
                e.runner.submit(request)
                e.runner.give_up(request)
            return some

    e.runner._arrived = Arrivals()
    assert found(e.generate([[2]], SEARCH)) == found(engine(eos=()).generate([[2]], SEARCH))
    assert isinstance(request.error, Aborted)
    assert quiet(e)
    assert_all_pages_free(e)


def test_turns_go_to_those_who_wait() -> None:
    """A thread that takes step after step does not keep another from its own."""
    runner: Runner = tiny_engine().runner
    order: list[str] = []

    def other() -> None:
        with runner.turn():
            order.append("other")

    thread = threading.Thread(target=other)
    with runner.turn():
        order.append("first")
        thread.start()
        while not runner._next_turn.locked():  # until it stands in line
            pass
    with runner.turn():
        order.append("again")
    thread.join()
    assert order == ["first", "other", "again"]


def test_scoring_takes_its_turn() -> None:
    e = tiny_engine()
    scores: list[float] = []
    thread = threading.Thread(target=lambda: scores.extend(e.score([[1, 2]], [[3, 4]])))
    with e.runner.turn():
        thread.start()
        while thread.is_alive() and not e.runner._next_turn.locked():
            pass
        assert not scores
    thread.join()
    assert scores == e.score([[1, 2]], [[3, 4]])


def test_texts_encoded_at_the_same_time_do_not_disturb_each_other() -> None:
    """A tokenizer's options are its state: a user's text must stay a text."""
    tokenizer = byte_tokenizer()
    e = make_engine(*tiny_triple(vocab_size=258, eos=(257,), bos=256), tokenizer=tokenizer)
    inside = 0
    most = 0
    call = type(tokenizer).__call__

    def watched(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        threading.Event().wait(0.002)
        try:
            return call(self, *args, **options)
        finally:
            inside -= 1

    async def main() -> None:
        async with AsyncEngine(e) as a:
            params = SearchParams(method="sample", max_new_tokens=2)
            await asyncio.gather(*(a.generate("<eos>", params) for _ in range(6)))

    with mock.patch.object(type(tokenizer), "__call__", watched):
        run(main())
    assert most == 1
