"""Prompts that begin alike are computed once, in every model, and no result changes."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from tests.support.broken_models import broken_triple, failing
from tests.support.engines import (
    MIXED,
    PROMPTS,
    SEARCH,
    assert_all_pages_free,
    engine,
    forwarded,
    found,
    make_engine,
    models_of,
)
from tests.support.tiny_models import tiny_triple
from w2s_fast.errors import EngineFailure, NumericalError
from w2s_fast.models.model import PagedModel
from w2s_fast.search.search import Search

SYSTEM = [p % 17 + 1 for p in range(40)]


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_a_prompt_is_run_once_for_all_requests_that_begin_with_it(page_size: int) -> None:
    triple = tiny_triple(eos=(), layers=2)
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


@functools.cache
def round_of(start: int) -> tuple[list[list[int]], Any]:
    """Prompts that begin with ever other tokens, and what is found without a prefix cache."""
    prompts = [[(start + i) % 19, *SYSTEM[: 9 * i], *p] for i, p in enumerate(PROMPTS)]
    return prompts, found(engine(prefix_cache=False).generate(prompts, MIXED))


@pytest.mark.parametrize("page_size", [1, 4])
def test_cached_pages_never_stand_in_the_way(page_size: int) -> None:
    """In a cache that the requests fill again and again, with other prompts each time."""
    e = make_engine(*tiny_triple(eos=(0, 6, 13)), page_size=page_size, kv_cache_tokens=260)
    for start in range(6):
        prompts, expected = round_of(start)
        assert found(e.generate(prompts, MIXED)) == expected
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
    e = make_engine(*broken_triple(triple, which, 7, math.nan))
    for _ in range(2):
        with pytest.raises(NumericalError, match=which):
            e.generate([[*SYSTEM[:12], 7, *SYSTEM[:8]]], SEARCH)
    statistics = {m.name: m.pool.cache_statistics for m in models_of(e)}
    assert statistics[which].hit_tokens == 0


def test_what_prompts_of_the_same_step_begin_with_is_run_once_in_each_model() -> None:
    triple = tiny_triple(eos=(), dtype=torch.float32)
    prompts = [[*SYSTEM, i, *SYSTEM[: i % 3]] for i in range(1, 13)]
    cold = make_engine(*triple, prefix_cache=False)
    with forwarded(*triple) as without:
        expected = cold.generate(prompts, SEARCH)
    e = make_engine(*triple)
    with forwarded(*triple) as tokens:
        results = e.generate(prompts, SEARCH)
    saved = (len(prompts) - 1) * len(SYSTEM)
    assert [a - b for a, b in zip(without, tokens, strict=True)] == [saved] * 3
    assert found(results) == found(expected)
    # The longest of them goes first, and is the only one that runs the beginning itself.
    assert sorted(r.stats.cached_tokens for r in results if r.stats) == [0] + [len(SYSTEM)] * 11
    assert e.stats().passes == cold.stats().passes + 1
    assert e.stats().rows == cold.stats().rows + 1
    assert found([e.generate([p], SEARCH)[0] for p in prompts]) == found(expected)
    assert_all_pages_free(e)


def test_requests_that_differ_in_their_seeds_alone_run_their_prompt_once() -> None:
    triple = tiny_triple(eos=())
    params = [replace(q, seed=i) for i, q in enumerate(MIXED * 3)]
    prompts = [SYSTEM[:34]] * len(params)
    e = make_engine(*triple)
    results = e.generate(prompts, params)
    # Two tokens are left to each: the last one is always run, the other fills no page.
    assert sorted({r.stats.cached_tokens for r in results if r.stats}) == [0, 32]
    off = make_engine(*triple, prefix_cache=False)
    assert found(results) == found(off.generate(prompts, params))


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("room", [1, 2, 3])
def test_pages_shared_by_newcomers_are_within_what_was_promised(page_size: int, room: int) -> None:
    """In pools that have what ``room`` requests are promised, and not a page more."""
    triple = tiny_triple(eos=())
    params = replace(SEARCH, chunk_length=None)  # one round, so that the promises stay the same
    prompts = [[*SYSTEM[:20], i, *SYSTEM[:2]] for i in range(1, 8)]
    probe = make_engine(*triple, page_size=page_size)
    request = probe.make_request(prompts[0], params)
    probe.runner.submit(request)
    probe.runner.advance([request])
    e = make_engine(
        *triple, page_size=page_size, kv_cache_tokens=room * max(request.promised) * page_size
    )
    forward, step = PagedModel.forward, Search.step
    promised: list[list[int]] = []
    together = []

    def watched_step(self: Search, requests: Any) -> None:
        promised[:] = [r.promised for r in requests]
        together.append(len(requests))
        step(self, requests)

    def watched_forward(self: PagedModel, *args: Any) -> Any:
        out = forward(self, *args)
        for model, most in zip(models_of(e), map(sum, zip(*promised)), strict=True):
            assert model.pool.num_pages - model.pool.free_pages <= most
        return out

    with (
        mock.patch.object(e._scheduler, "_headroom", [0] * len(models_of(e))),
        mock.patch.object(Search, "step", watched_step),
        mock.patch.object(PagedModel, "forward", watched_forward),
    ):
        results = e.generate(prompts, params)
    assert max(together) == room
    assert found(results) == found(probe.generate(prompts, params))
    assert_all_pages_free(e)


@pytest.mark.parametrize("which", ["base", "tuned", "untuned"])
@pytest.mark.parametrize("where", ["in the beginning", "behind it"])
def test_a_newcomer_that_breaks_a_model_breaks_no_other(which: str, where: str) -> None:
    triple = tiny_triple(("llama", "llama", "llama"), eos=(), dtype=torch.float32)
    e = make_engine(*broken_triple(triple, which, 7, math.nan))
    good = make_engine(*triple, prefix_cache=False)
    beginning = [t for t in SYSTEM if t != 7][:16]
    # The longest goes first, and it is a broken one.
    if where == "in the beginning":
        broken = [[*beginning[:9], 7, *beginning, i, 1] for i in range(3)]
    else:
        broken = [[*beginning, 7, i, *beginning] for i in range(3)]
    sound = [[*beginning, 3, i] for i in range(4)]
    expected = good.generate(sound, SEARCH)
    for _ in range(2):
        results = e.generate([*broken, *sound], SEARCH, on_error="return")
        assert all(isinstance(r.error, NumericalError) for r in results[:3])
        assert all(which in str(r.error) for r in results[:3])
        clean = 0
        for result, good_result in zip(results[3:], expected, strict=True):
            assert good_result.trace is not None
            candidates = [c for r in good_result.trace.rounds for c in r.candidates]
            if not any(7 in c.token_ids for c in candidates):
                assert found([result]) == found([good_result])
                clean += 1
        assert clean
    assert_all_pages_free(e)


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["base", "tuned", "untuned"])
def test_an_exception_while_one_goes_first_leaves_no_page_behind(which: int, call: int) -> None:
    triple = tiny_triple(eos=())
    e = make_engine(*triple)
    prompts = [[*SYSTEM, i] for i in range(4)]
    with (
        failing(triple[which], call, MemoryError("for the test")),
        pytest.raises(EngineFailure, match="for the test"),
    ):
        e.generate(prompts, SEARCH)
    assert_all_pages_free(e)
    off = make_engine(*triple, prefix_cache=False)
    assert found(e.generate(prompts, SEARCH)) == found(off.generate(prompts, SEARCH))
