"""Same request, same seed, same tokens, in fp32: alone, among 64, in any order, and set aside."""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import Sequence
from typing import Any

import torch

from tests.support.engines import assert_all_pages_free, make_engine
from tests.support.tiny_models import VOCABULARY, tiny_triple
from w2s_fast import AsyncEngine, Engine, SearchParams, SearchResult

REQUESTS = 64


def fp32_engine(**options: Any) -> Engine:
    return make_engine(*tiny_triple(eos=(0, 6), dtype=torch.float32), **options)


@functools.cache
def requests() -> tuple[list[list[int]], list[SearchParams]]:
    """Prompts of 1 to 20 tokens, some with the same beginning, and all kinds of parameters."""
    draw = random.Random(0)
    beginning = [draw.randrange(1, VOCABULARY) for _ in range(14)]
    prompts, params = [], []
    for i in range(REQUESTS):
        own = [draw.randrange(1, VOCABULARY) for _ in range(draw.randint(1, 6))]
        prompts.append((beginning if i % 3 == 0 else []) + own)
        method: Any = draw.choice(["cbs", "cbs", "cbs", "bon", "sample"])
        width = draw.randint(1, 4)
        params.append(
            SearchParams(
                method=method,
                beam_width=width,
                successors=draw.randint(width if method == "bon" else 2, 4),
                chunk_length=draw.choice([1, 2, 3, 5, 8, None]),
                max_new_tokens=draw.randint(1, 19),
                temperature=draw.choice([0.0, 0.5, 0.7, 1.0, 1.5]),
                top_k=draw.choice([0, 5, 50]),
                top_p=draw.choice([0.8, 1.0]),
                seed=draw.randrange(2**64),
                n=width,
                finished=draw.choice(["hold", "replicate"]),
                score=draw.choice(["sum", "mean"]),
            )
        )
    return prompts, params


def tokens(results: Sequence[SearchResult]) -> list[list[list[int]]]:
    return [[h.token_ids for h in r.hypotheses] for r in results]


@functools.cache
def alone() -> list[list[list[int]]]:
    e = fp32_engine(prefix_cache=False)
    return [tokens(e.generate([p], q))[0] for p, q in zip(*requests())]


def test_the_requests_differ() -> None:
    assert len({str(answer) for answer in alone()}) == REQUESTS
    assert sum(len(h) for answer in alone() for h in answer) > 1000


def test_among_64_others_and_again_on_the_same_engine() -> None:
    # Whatever an engine keeps of earlier requests, pages of their prompts above all, is cold in
    # the first turn and warm in the second.
    e = fp32_engine()
    assert tokens(e.generate(*requests())) == alone()
    cold = e.stats().pools["base"].cache_hit_tokens
    assert tokens(e.generate(*requests())) == alone()
    assert e.stats().pools["base"].cache_hit_tokens > 2 * cold
    assert_all_pages_free(e)


def test_where_prompts_enter_in_pieces() -> None:
    e = fp32_engine(max_pass_tokens=16)
    assert tokens(e.generate(*requests())) == alone()
    assert_all_pages_free(e)


def test_in_another_order() -> None:
    prompts, params = requests()
    order = list(range(REQUESTS))
    random.Random(1).shuffle(order)
    e = fp32_engine(max_rows=100)
    results = e.generate([prompts[i] for i in order], [params[i] for i in order])
    assert tokens(results) == [alone()[i] for i in order]


def test_after_being_set_aside() -> None:
    e = fp32_engine(kv_cache_tokens=440)
    assert tokens(e.generate(*requests())) == alone()
    assert e.stats().set_aside >= 5
    assert_all_pages_free(e)


def test_as_tasks_that_come_one_after_the_other() -> None:
    async def main() -> list[SearchResult]:
        draw = random.Random(2)
        async with AsyncEngine(fp32_engine()) as a:

            async def one(prompt: list[int], params: SearchParams) -> SearchResult:
                await asyncio.sleep(draw.random() / 10)
                return await a.generate(prompt, params, priority=draw.randint(-1, 1))

            return await asyncio.gather(*(one(p, q) for p, q in zip(*requests())))

    assert tokens(asyncio.run(main())) == alone()
