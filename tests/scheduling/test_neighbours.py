"""Requests side by side: none changes, harms or starves another."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

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
from tests.support.tiny_models import (
    VOCABULARY,
    tiny_triple,
)
from w2s_fast import Engine, Guide, SearchParams
from w2s_fast.errors import (
    InvalidRequest,
    W2SFastError,
)


def test_a_request_finds_the_same_alone_among_others_and_in_any_order() -> None:
    e = engine()
    prompts = [p for p in PROMPTS for _ in MIXED]
    params = [replace(m, seed=i) for i, m in enumerate(MIXED * len(PROMPTS))]
    alone = [e.generate([p], [s])[0] for p, s in zip(prompts, params, strict=True)]
    together = e.generate(prompts, params)
    assert found(together) == found(alone)
    backwards = e.generate(prompts[::-1], params[::-1])[::-1]
    assert found(backwards) == found(alone)
    assert_all_pages_free(e)


@pytest.mark.parametrize("max_rows", [1, 7, 1000])
def test_how_many_rows_run_together_changes_no_result(max_rows: int) -> None:
    e = make_engine(*tiny_triple(eos=(0, 6, 13)), max_rows=max_rows)
    assert found(e.generate(PROMPTS, MIXED)) == found(engine().generate(PROMPTS, MIXED))


@pytest.mark.parametrize("page_size", [1, 2, 5, 16, 64])
def test_the_size_of_pages_changes_no_result(page_size: int) -> None:
    e = make_engine(*tiny_triple(eos=(0, 6, 13)), page_size=page_size)
    assert found(e.generate(PROMPTS, MIXED)) == found(engine().generate(PROMPTS, MIXED))
    assert_all_pages_free(e)


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_requests_wait_where_pages_are_few_and_find_the_same(page_size: int) -> None:
    def with_room_for(tokens: int) -> Engine:
        triple = tiny_triple(eos=(0, 6, 13))
        return make_engine(*triple, page_size=page_size, kv_cache_tokens=tokens)

    def accepted(tokens: int) -> bool:
        try:
            e = with_room_for(tokens)
        except W2SFastError:
            return False
        try:
            for prompt, params in zip(PROMPTS, MIXED):
                e.make_request(prompt, params)
        except InvalidRequest as error:
            if "kv_cache_tokens" not in str(error):
                raise
            return False
        return True

    # The smallest cache, to the page, in which each request is accepted at all.
    sizes = range(6 * page_size, 1024, page_size)
    tokens = sizes[bisect_left(sizes, True, key=accepted)]
    e = with_room_for(tokens)
    results = e.generate(PROMPTS, MIXED)
    assert found(results) == found(engine().generate(PROMPTS, MIXED))
    assert_all_pages_free(e)
    assert tokens <= 40 * 11 // page_size * page_size  # and it is not a wasteful size


def test_a_request_that_can_never_fit_is_refused_and_its_neighbours_run() -> None:
    e = make_engine(*tiny_triple(eos=(0, 6, 13)), kv_cache_tokens=160)
    large = SearchParams(beam_width=4, successors=8, chunk_length=20, max_new_tokens=60)
    small = SearchParams(beam_width=2, successors=2, chunk_length=4, max_new_tokens=8, trace=True)
    results = e.generate([[1, 2], [1, 2], [4]], [small, large, small], on_error="return")
    assert isinstance(results[1].error, InvalidRequest)
    assert "kv_cache_tokens" in str(results[1].error)
    assert found([results[0], results[2]]) == found(engine().generate([[1, 2], [4]], small))
    assert_all_pages_free(e)


def test_results_come_as_they_end_each_once() -> None:
    e = engine()
    params = [replace(SEARCH, max_new_tokens=n) for n in (30, 2, 14, 1, 5)]
    seen = list(e.as_completed(PROMPTS, params))
    assert sorted(index for index, _ in seen) == list(range(5))
    assert [index for index, _ in seen][-1] == 0 or dict(seen)[0].finish_reason == "eos"
    expected = e.generate(PROMPTS, params)
    assert found([dict(seen)[i] for i in range(5)]) == found(expected)


def test_an_iteration_that_is_given_up_gives_its_pages_back() -> None:
    e = make_engine(*tiny_triple(eos=()))
    iteration = e.as_completed(
        PROMPTS, [replace(SEARCH, max_new_tokens=3 + 9 * i) for i in range(5)]
    )
    next(iteration)
    assert e.base.pool.free_pages < e.base.pool.num_pages
    iteration.close()
    assert_all_pages_free(e)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_an_iteration_given_up_in_the_middle_of_a_round_gives_its_pages_back(steps: int) -> None:
    # Short requests end while the long one is at some point of its first or a later round.
    e = make_engine(*tiny_triple(eos=()))
    long = replace(SEARCH, chunk_length=20, max_new_tokens=60)
    short = [replace(SEARCH, method="sample", max_new_tokens=7 * i) for i in range(1, 6)]
    iteration = e.as_completed([[1]] * 6, [long, *short])
    for _ in range(steps):
        index, result = next(iteration)
        assert index > 0
        assert result.error is None
    iteration.close()
    assert_all_pages_free(e)
    assert found(e.generate(PROMPTS, MIXED)) == found(engine(eos=()).generate(PROMPTS, MIXED))


def test_prompts_may_be_an_endless_source() -> None:
    def source() -> Any:
        index = 0
        while True:
            yield [index % VOCABULARY, 1]
            index += 1

    iteration = engine().as_completed(source(), replace(SEARCH, max_new_tokens=3))
    seen = {next(iteration)[0] for _ in range(80)}
    iteration.close()
    assert len(seen) == 80
    assert_all_pages_free(engine())


def test_prompts_that_begin_one_after_the_other_end_so() -> None:
    """Together they are as long as one another, and come in one wave."""
    e = make_engine(*tiny_triple(eos=()))
    params = replace(SEARCH, max_new_tokens=12)
    alone = e.generate(PROMPTS, params)
    for at_once, ended in ((None, len(PROMPTS)), (len(PROMPTS), len(PROMPTS)), (2, 2), (1, 1)):
        before = e.stats().finished
        completed = e.as_completed(PROMPTS, params, at_once=at_once)
        index, result = next(completed)
        assert (index, result.token_ids) == (0, alone[0].token_ids)
        assert e.stats().finished - before == ended
        assert [i for i, _ in completed] == list(range(1, len(PROMPTS)))
    with pytest.raises(InvalidRequest, match="at_once is 0"):
        next(e.as_completed(PROMPTS, params, at_once=0))


def test_two_iterations_over_one_engine_do_not_disturb_each_other() -> None:
    e = engine()
    first = e.as_completed(PROMPTS, SEARCH)
    second = e.as_completed(PROMPTS[::-1], MIXED)
    a, b = [next(first)], [next(second)]
    a += list(first)
    b += list(second)
    assert found([r for _, r in sorted(a, key=lambda x: x[0])]) == found(
        e.generate(PROMPTS, SEARCH)
    )
    assert found([r for _, r in sorted(b, key=lambda x: x[0])]) == found(
        e.generate(PROMPTS[::-1], MIXED)
    )
    assert_all_pages_free(e)


def test_a_prompt_is_computed_once_and_a_survivor_once_for_all_its_children() -> None:
    triple = tiny_triple(eos=())
    e = make_engine(*triple)
    params = SearchParams(beam_width=2, successors=3, chunk_length=4, max_new_tokens=11, trace=True)
    with forwarded(*triple) as totals:
        results = e.generate(PROMPTS, params)
    expected = 0
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert result.trace is not None
        first, *later = result.trace.rounds
        # A chunk's last token waits for its selection; then only survivors' are run.
        expected += len(prompt) + (4 - 1) * len(first.candidates)
        for one, chunk in zip(later, (4, 3), strict=True):
            expected += params.beam_width + (chunk - 1) * len(one.candidates)
    assert totals[0] == expected
    sampled = sum(r.usage.sampled_tokens for r in results)
    assert totals[1:] == [sampled + sum(len(p) - 1 for p in PROMPTS)] * 2


def test_a_trace_is_recorded_only_where_it_was_asked_for() -> None:
    with_trace, without = engine().generate([[5]] * 2, [SEARCH, replace(SEARCH, trace=False)])
    assert with_trace.trace is not None
    assert without.trace is None
    assert with_trace.hypotheses == without.hypotheses


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64", torch.bfloat16])
def test_models_run_in_the_type_asked_for(dtype: Any, folders: dict[str, Path]) -> None:
    e = Engine(
        base=folders["base"],
        guides=Guide(folders["tuned"], folders["untuned"]),
        device="cpu",
        dtype=dtype,
        kv_cache_tokens=1024,
    )
    expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    for model in models_of(e):
        assert model.model.dtype == expected
        assert model.pool.kv.dtype == expected
    prompt = [7, 8, 9]
    (result,) = e.generate([prompt], SearchParams(beam_width=2, successors=2, max_new_tokens=12))
    (again,) = e.score([prompt], [result.token_ids])
    assert result.score == pytest.approx(again, abs=0.5)
    assert len(result.token_ids) <= 12
