"""AsyncEngine: many tasks, one engine; nobody waits for nothing, and all find what Engine finds."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from typing import Any
from unittest import mock

from tests.support.async_tasks import PATIENCE, read, run, until
from tests.support.engines import (
    MIXED,
    PROMPTS,
    SEARCH,
    assert_all_pages_free,
    engine,
    found,
    make_engine,
    tiny_engine,
)
from tests.support.tiny_models import byte_tokenizer, tiny_triple
from w2s_fast import AsyncEngine, SearchParams, SearchResult, StreamPiece
from w2s_fast.errors import InvalidRequest


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
            texts = ["a<eos>", "plain"] * 3
            results = await asyncio.gather(*(a.generate(text, params) for text in texts))
            for text, result in zip(texts, results):
                assert result.usage.prompt_tokens == 1 + len(text)  # BOS, and bytes

    with mock.patch.object(type(tokenizer), "__call__", watched):
        run(main())
    assert most == 1


def test_rounds_are_told_as_they_end_and_before_the_text_that_they_make_certain() -> None:
    e = engine(eos=())
    (expected,) = e.generate([PROMPTS[0]], replace(SEARCH, max_new_tokens=24))
    assert expected.trace is not None

    async def watch() -> list[Any]:
        async with AsyncEngine(e) as shared:
            params = replace(SEARCH, max_new_tokens=24, trace=False)
            return [each async for each in shared.watch(PROMPTS[0], params)]

    told = asyncio.run(watch())
    rounds = [each for each in told if not isinstance(each, StreamPiece)]
    assert rounds == expected.trace.rounds
    pieces = [each for each in told if isinstance(each, StreamPiece)]
    assert pieces[-1] is told[-1] and pieces[-1].result is not None
    assert [t for piece in pieces for t in piece.token_ids] == expected.token_ids
    # What is certain after a round, all of its survivors begin with.
    certain: list[int] = []
    last = None
    for each in told[:-1]:
        if isinstance(each, StreamPiece):
            certain += each.token_ids
            assert last is not None
            for k in last.kept:
                assert last.candidates[k].token_ids[: len(certain)] == certain
        else:
            last = each
