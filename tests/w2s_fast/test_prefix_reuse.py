"""Prompts that begin alike are computed once, in every model, and no result changes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.tiny_models import tiny_triple
from tests.w2s_fast.engines import (
    MIXED,
    PROMPTS,
    SEARCH,
    assert_all_pages_free,
    engine,
    found,
    make_engine,
    models_of,
)
from tests.w2s_fast.test_broken_numbers import broken_copy
from tests.w2s_fast.test_guide import forwarded
from w2s_fast.errors import NumericalError

SYSTEM = [p % 17 + 1 for p in range(40)]


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_a_prompt_is_run_once_for_all_requests_that_begin_with_it(page_size: int) -> None:
    triple = tiny_triple(eos=())
    warm = make_engine(*triple, page_size=page_size)
    cold = make_engine(*triple, page_size=page_size, prefix_cache=False)
    first, second = [*SYSTEM, 3, 1], [*SYSTEM, 9, 2, 6]
    with forwarded(*triple) as without:
        expected = [cold.generate([p], SEARCH)[0] for p in (first, second, second)]
    with forwarded(*triple) as tokens:
        results = [warm.generate([p], SEARCH)[0] for p in (first, second, second)]
    assert found(results) == found(expected)
    shared = len(SYSTEM) // page_size * page_size
    again = (len(second) - 1) // page_size * page_size  # the last token is always run
    assert [r.stats.cached_tokens for r in results if r.stats] == [0, shared, again]
    assert [a - b for a, b in zip(without, tokens, strict=True)] == [shared + again] * 3
    assert_all_pages_free(warm)


def test_the_cache_changes_no_result() -> None:
    e = make_engine(*tiny_triple(eos=(0, 6, 13)))
    prompts = [[*SYSTEM, *p] for p in PROMPTS]
    off = make_engine(*tiny_triple(eos=(0, 6, 13)), prefix_cache=False)
    expected = found(off.generate(prompts, MIXED))
    for _ in range(3):
        assert found(e.generate(prompts, MIXED)) == expected
    for model in models_of(e):
        assert model.pool.cached_pages > 0
        assert model.pool.cache_statistics.hit_tokens > 0
        model.pool.drop_cache()
    assert found(e.generate(prompts, MIXED)) == expected
    assert_all_pages_free(e)
    assert all(model.pool.cached_pages == 0 for model in models_of(off))


@pytest.mark.parametrize("page_size", [1, 4])
def test_cached_pages_never_stand_in_the_way(page_size: int) -> None:
    """In a cache that the requests fill again and again, with other prompts each time."""
    e = make_engine(*tiny_triple(eos=(0, 6, 13)), page_size=page_size, kv_cache_tokens=260)
    for start in range(8):
        prompts = [[(start + i) % 19, *SYSTEM[: 9 * i], *p] for i, p in enumerate(PROMPTS)]
        expected = engine().generate(prompts, MIXED)
        assert found(e.generate(prompts, MIXED)) == found(expected)
    assert all(m.pool.cache_statistics.evictions > 0 for m in models_of(e))
    assert_all_pages_free(e)


def test_a_request_set_aside_finds_its_prompt_again() -> None:
    triple = tiny_triple(eos=())
    e = make_engine(*triple, kv_cache_tokens=420)
    params = replace(SEARCH, max_new_tokens=40)
    prompts = [[i, *SYSTEM[:20]] for i in range(1, 6)]
    results = e.generate(prompts, params)
    assert sum(r.stats.set_aside for r in results if r.stats) > 0
    assert found(results) == found(engine(eos=()).generate(prompts, params))
    assert all(m.pool.cache_statistics.hit_tokens > 0 for m in models_of(e))


@pytest.mark.parametrize("which", ["base", "tuned", "untuned"])
def test_what_made_a_model_fail_is_not_remembered(which: str) -> None:
    triple = tiny_triple(("llama", "llama", "llama"), eos=(), dtype=torch.float32)
    e = make_engine(*(
        broken_copy(model, 7, math.nan) if name == which else model
        for name, model in triple._asdict().items()
    ))  # fmt: skip
    for _ in range(2):
        with pytest.raises(NumericalError, match=which):
            e.generate([[*SYSTEM[:12], 7, *SYSTEM[:8]]], SEARCH)
    statistics = {m.name: m.pool.cache_statistics for m in models_of(e)}
    assert statistics[which].hit_tokens == 0
