"""Prompts, recomputation and scoring in passes of bounded size: equal results, and nobody waits."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.broken_models import broken_triple, failing
from tests.support.drawn import drawn
from tests.support.engines import (
    LONG_PROMPTS,
    MIXED,
    RAGGED_PROMPTS,
    SEARCH,
    assert_all_pages_free,
    forwarded,
    found,
    make_engine,
)
from tests.support.tiny_models import VOCABULARY, tiny_model, tiny_triple
from w2s_fast import Engine, Guide, SearchParams, SearchResult
from w2s_fast.errors import Aborted, EngineFailure, NumericalError
from w2s_fast.models import PagedModel
from w2s_fast.scheduling.scheduler import Room
from w2s_fast.search import Request

BOUNDS = (pytest.param(1, marks=pytest.mark.thorough), 3, 7, 64)
ROUNDING = 1e-9


class Pass(NamedTuple):
    """One that appended tokens to rows; a step of decoding is none."""

    model: PagedModel
    tokens: int


@contextmanager
def passes() -> Iterator[list[Pass]]:
    """All within, by whichever engine."""
    seen: list[Pass] = []
    forward = PagedModel.forward

    def watched(self: PagedModel, slots: Any, tokens: Any, *args: Any, **more: Any) -> Any:
        seen.append(Pass(self, len(tokens)))
        return forward(self, slots, tokens, *args, **more)

    with mock.patch.object(PagedModel, "forward", watched):
        yield seen


@functools.cache
def two_guides(bound: int | None, cache: bool, tokens: int = 4096) -> Engine:
    families = (("gpt2", "llama", 1.0), ("llama", "mistral", -0.5))
    return Engine(
        base=tiny_model("llama", eos=(0, 6), layers=1),
        guides=[
            Guide(tiny_model(t, seed=10 + g, layers=1), tiny_model(u, seed=20 + g, layers=1), w)
            for g, (t, u, w) in enumerate(families)
        ],
        device="cpu",
        page_size=4,
        kv_cache_tokens=tokens,
        prefix_cache=cache,
        max_pass_tokens=bound,
    )


def numbers(results: Sequence[SearchResult]) -> torch.Tensor:
    """Every score and log-prob, in float64."""
    found = [[*h.token_scores, *h.token_logprobs] for r in results for h in r.hypotheses]
    return torch.tensor([x for own in found for x in own if x is not None], dtype=torch.float64)


def assert_equal(one: Sequence[SearchResult], other: Sequence[SearchResult]) -> None:
    assert found(one) == found(other)
    torch.testing.assert_close(numbers(one), numbers(other), rtol=0, atol=ROUNDING)


TOKEN = st.integers(1, VOCABULARY - 1)


@st.composite
def batches(draw: st.DrawFn, bound: int) -> tuple[list[list[int]], list[SearchParams]]:
    """Prompts, some of which begin alike, and how each is searched.

    All that a small bound cuts into many passes is short: each token may be a pass in every model.
    """
    long = min(70, 12 * bound)
    beginning = draw(st.lists(TOKEN, max_size=min(30, 8 * bound)))
    prompt = st.lists(TOKEN, min_size=1, max_size=6)
    prompt |= st.lists(TOKEN, min_size=long // 3, max_size=long)
    prompts = draw(st.lists(prompt, min_size=1, max_size=min(5, 2 + bound // 3)))
    prompts = [[*beginning, *p] if draw(st.booleans()) else p for p in prompts]
    drawn = [draw(st.sampled_from(MIXED)) for _ in prompts]
    most = min(20, 4 + bound)
    shorter = [
        replace(q, max_new_tokens=min(q.max_new_tokens, most), seed=i) for i, q in enumerate(drawn)
    ]
    return prompts, shorter


@pytest.mark.long
@drawn(8)
@given(cache=st.booleans(), data=st.data())
@pytest.mark.parametrize("bound", BOUNDS)
def test_every_bound_gives_equal_results(bound: int, cache: bool, data: st.DataObject) -> None:
    prompts, params = data.draw(batches(bound))
    expected = two_guides(None, cache).generate(prompts, params)
    e = two_guides(bound, cache)
    with passes() as seen:
        # The second time with whatever the first has left in the caches.
        for _ in range(2 if cache else 1):
            results = e.generate(prompts, params)
            torch.testing.assert_close(numbers(results), numbers(expected), rtol=0, atol=ROUNDING)
            assert found(results)[0][0] == found(expected)[0][0]
            assert [r.token_ids for r in results] == [r.token_ids for r in expected]
    assert max(one.tokens for one in seen) <= bound
    assert_all_pages_free(e)
    assert_all_pages_free(two_guides(None, cache))


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("bound", BOUNDS)
def test_those_set_aside_come_back_in_pieces(bound: int, cache: bool) -> None:
    params = [replace(SEARCH, max_new_tokens=16, seed=i) for i in range(3)]
    prompts = RAGGED_PROMPTS[:3]
    expected = two_guides(None, cache).generate(prompts, params)
    e = two_guides(bound, cache, tokens=112)
    with passes() as seen:
        results = e.generate(prompts, params)
    assert e.stats().set_aside > 0
    assert max(one.tokens for one in seen) <= bound
    torch.testing.assert_close(numbers(results), numbers(expected), rtol=0, atol=ROUNDING)
    assert [r.token_ids for r in results] == [r.token_ids for r in expected]
    assert_all_pages_free(e)


@pytest.mark.parametrize("bound", BOUNDS)
def test_long_texts_are_scored_in_pieces(bound: int) -> None:
    most = 20 * bound
    prompts = [p[:most] for p in LONG_PROMPTS]
    responses = [[t % 18 + 1 for t in range(min(n, most))] for n in (1, 70, 3, 17, 40)]
    expected = two_guides(None, True).score(prompts, responses)
    e = two_guides(bound, True)
    with passes() as seen:
        scores = e.score(prompts, responses)
    assert max(one.tokens for one in seen) <= bound
    assert scores == pytest.approx(expected, abs=1e-5)  # log-probs are float32
    assert_all_pages_free(e)


def test_many_long_prompts_never_make_a_large_pass() -> None:
    triple = tiny_triple(eos=())
    e = make_engine(*triple, kv_cache_tokens=40_000, max_rows=256, max_pass_tokens=256)
    plain = SearchParams(method="sample", max_new_tokens=2)
    prompts = [[(7 * i + t * t) % 19 + 1 for t in range(100)] for i in range(256)]
    with passes() as seen:
        results = e.generate(prompts, plain)
    assert all(r.error is None for r in results)
    assert max(one.tokens for one in seen) <= 256


def submitted(e: Engine, prompt: list[int], params: SearchParams, priority: int = 0) -> Request:
    request = e.make_request(prompt, params, priority)
    e.runner.submit(request)
    return request


def end(e: Engine, *requests: Request) -> None:
    while left := [request for request in requests if not request.ended]:
        e.runner.advance(left)


LONG_PROMPT = [t % 18 + 1 for t in range(100)]
MANY = SearchParams(method="sample", n=2, max_new_tokens=90, ignore_eos=True)


@pytest.mark.parametrize("params", [SEARCH, SearchParams(method="sample", max_new_tokens=4)])
def test_running_requests_draw_in_every_step_while_a_long_prompt_enters(
    params: SearchParams,
) -> None:
    e = make_engine(*tiny_triple(eos=()), max_pass_tokens=8)
    running = [submitted(e, [1, 2], replace(MANY, seed=i)) for i in range(2)]
    running.append(submitted(e, [3, 4], replace(SEARCH, max_new_tokens=60)))
    e.runner.advance(running)
    late = submitted(e, LONG_PROMPT, params, priority=-1)
    steps = 0
    while late.beams.sampled == 0:
        before = [request.beams.sampled for request in running]
        with passes() as seen:
            e.runner.advance([late])
        assert max(one.tokens for one in seen) <= 8
        assert all(r.beams.sampled > n for r, n in zip(running, before, strict=True))
        # A pass of its prompt in every step.
        steps += 1
        if late.beams.sampled == 0:
            assert late.in_round
            assert e.base.pool.lengths(late.beams.kept_slots(0)).tolist() == [8 * steps]
    assert steps == math.ceil(len(LONG_PROMPT) / 8)
    end(e, late, *running)
    alone = make_engine(*tiny_triple(eos=()))
    assert found([e.result(late)]) == found(alone.generate([LONG_PROMPT], params))
    assert_all_pages_free(e)


def test_the_most_urgent_prompt_enters_first() -> None:
    e = make_engine(*tiny_triple(eos=()), max_pass_tokens=10)
    plain = SearchParams(method="sample", max_new_tokens=1)
    requests = [submitted(e, [i, *LONG_PROMPT[:29]], plain, priority=-i) for i in range(1, 4)]
    order = []
    while left := [request for request in requests if not request.ended]:
        e.runner.advance(left)
        order += [r for r in requests if r.ended and r not in order]
    assert order == requests[::-1]


@pytest.mark.parametrize("bound", [3, 16, 1000])
def test_what_prompts_begin_with_is_run_once_whatever_the_bound(bound: int) -> None:
    triple = tiny_triple(eos=())
    e = make_engine(*triple, max_pass_tokens=bound)
    prompts = [[*LONG_PROMPT[:40], i, i] for i in range(1, 6)]
    with forwarded(*triple) as totals:
        e.generate(prompts, SearchParams(method="sample", max_new_tokens=1))
    assert totals == [40 + 5 * 2, 0, 0]
    params = SearchParams(beam_width=1, successors=2, chunk_length=1, max_new_tokens=1, n=1)
    with forwarded(*triple) as totals:
        e.generate(prompts, params)
    # Each candidate runs the prompt's last token, before its own.
    assert totals[1:] == [40 + 5 * 1 + 5 * 2] * 2


def test_pieces_of_a_prompt_that_was_given_up_are_found_again() -> None:
    e = make_engine(*tiny_triple(eos=()), max_pass_tokens=8)
    request = submitted(e, LONG_PROMPT, SEARCH)
    for _ in range(4):
        e.runner.advance([request])
    e.runner.give_up(request)
    e.runner.settle()
    assert isinstance(request.error, Aborted)
    assert_all_pages_free(e)
    (again,) = e.generate([LONG_PROMPT], SEARCH)
    assert again.stats is not None
    assert again.stats.cached_tokens == 32
    alone = make_engine(*tiny_triple(eos=()))
    assert found([again]) == found(alone.generate([LONG_PROMPT], SEARCH))


@pytest.mark.parametrize("how", ["given up", "weights", "set aside"])
def test_a_prompt_may_be_stopped_at_any_of_its_pieces(how: str) -> None:
    """In the base, between base and guides, in the guides, and while it comes back."""
    e = make_engine(*tiny_triple(eos=()), max_pass_tokens=9, prefix_cache=False)
    params = replace(SEARCH, max_new_tokens=6)
    (expected,) = make_engine(*tiny_triple(eos=())).generate([LONG_PROMPT[:40]], params)
    stops = 0
    while True:
        request = submitted(e, LONG_PROMPT[:40], params)
        for _ in range(stops):
            e.runner.advance([request])
        if request.ended:
            break
        stops += 1
        if how == "given up":
            e.runner.give_up(request)
            e.runner.settle()
            assert_all_pages_free(e)
            continue
        for _ in range(3):  # it comes back in several steps, and is stopped once more
            if how == "weights":
                e.weights_changed()
            else:
                pool = e.guides[0].models[0].pool
                with e.runner.turn_with([Room(pool, pool.num_pages, 1)]):
                    pass
            if not request.ended:
                e.runner.advance([request])
        end(e, request)
        # What was drawn twice is counted twice.
        result = replace(e.result(request), usage=expected.usage)
        assert found([result]) == found([expected])
        assert_all_pages_free(e)
    assert stops > 40 / 9


@pytest.mark.parametrize("which", [0, 1, 2])
def test_an_error_in_any_piece_leaves_no_page(which: int) -> None:
    triple = tiny_triple(eos=())
    e = make_engine(*triple, max_pass_tokens=9, prefix_cache=False, kv_cache_tokens=160)
    params = [replace(SEARCH, max_new_tokens=6, seed=i) for i in range(2)]
    prompts = [LONG_PROMPT[:40], LONG_PROMPT[5:30]]
    expected = found(e.generate(prompts, params))
    for call in itertools.count(1, 2):
        with failing(triple[which], call, RuntimeError("for the test")):
            results = e.generate(prompts, params, on_error="return")
        assert all(r.error is None or isinstance(r.error, EngineFailure) for r in results)
        assert_all_pages_free(e)
        if all(r.error is None for r in results):
            break  # it makes fewer passes
    assert call > 40 / 9 + 25 / 9
    assert found(e.generate(prompts, params)) == expected


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("which", ["base", "tuned", "untuned"])
def test_a_broken_number_in_a_piece_ends_only_that_request(which: str, cache: bool) -> None:
    triple = tiny_triple(("llama", "llama", "llama"), layers=2, eos=(), dtype=torch.float32)
    broken = broken_triple(triple, which, 7, math.nan)
    e = make_engine(*broken, max_pass_tokens=8, prefix_cache=cache)
    sound = [t % 6 + 1 for t in range(50)]
    bad = [*sound[:30], 7, *sound[31:]]
    # Tokens that models draw must not be the one that breaks them.
    params = SearchParams(beam_width=1, successors=2, chunk_length=1, max_new_tokens=1, n=1)
    good = make_engine(*triple).generate([sound, sound[:40]], params)
    assert all(7 not in r.token_ids for r in good)
    results = e.generate([bad, sound, bad, sound[:40]], params, on_error="return")
    assert [type(r.error) for r in results[::2]] == [NumericalError] * 2
    assert found([results[1], results[3]]) == found(good)
    assert_all_pages_free(e)
