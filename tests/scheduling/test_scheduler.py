"""Requests share the pages: promised by rounds, set aside and recomputed, nobody waits for ever."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.drawn import drawn
from tests.support.engines import (
    MIXED,
    PROMPTS,
    SEARCH,
    assert_all_pages_free,
    engine,
    found,
    make_engine,
    models_of,
)
from tests.support.tiny_models import tiny_model, tiny_triple
from w2s_fast import Engine, SearchParams
from w2s_fast._pages import begin_rounds, end_rounds, round_pages, take_tokens
from w2s_fast.decoding import Draws
from w2s_fast.models.model import PagedModel
from w2s_fast.scheduling.scheduler import ROUNDS_PER_PRIORITY, Scheduler
from w2s_fast.search.guide_side import GuideSide
from w2s_fast.search.request import Request
from w2s_fast.search.search import Search, _step_tokens


@contextmanager
def setting_aside() -> Iterator[list[Request]]:
    """The requests that were set aside, one entry each time."""
    seen: list[Request] = []
    aside = Search.set_aside

    def counted(self: Search, request: Request) -> None:
        seen.append(request)
        aside(self, request)

    with mock.patch.object(Search, "set_aside", counted):
        yield seen


LONG = [replace(p, max_new_tokens=40, method="cbs", n=1) for p in MIXED if p.uses_guides]


MANY = PROMPTS * 2
MANY_PARAMS = [replace(p, seed=i) for i, p in zip(range(len(MANY)), itertools.cycle(LONG))]


@functools.cache
def alone() -> Any:
    """What each of many finds by itself, in an engine with room."""
    roomy = make_engine(*tiny_triple(eos=(0, 6, 13)))
    return found([roomy.generate([p], q)[0] for p, q in zip(MANY, MANY_PARAMS)])


@pytest.mark.parametrize("tokens", [420, 480, 560])
def test_requests_set_aside_find_what_they_would_have_found(tokens: int) -> None:
    tight = make_engine(*tiny_triple(eos=(0, 6, 13)), kv_cache_tokens=tokens)
    with setting_aside() as seen:
        together = tight.generate(MANY, MANY_PARAMS)
    assert seen
    assert found(together) == alone()
    assert_all_pages_free(tight)


def held(e: Engine) -> list[int]:
    return [m.pool.num_pages - m.pool.free_pages for m in models_of(e)]


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("params", [*MIXED, replace(SEARCH, max_new_tokens=33)])
def test_a_round_holds_no_more_pages_than_were_promised(
    params: SearchParams, page_size: int
) -> None:
    """P + W h + W K L tokens' worth, rounded to pages: counted after every pass of every model."""
    e = make_engine(*tiny_triple(eos=()), page_size=page_size)
    prompt = [p % 18 + 1 for p in range(13)]
    forward, step = PagedModel.forward, Search.step
    promised: list[int] = []
    most: list[int] = []

    def watched_step(self: Search, requests: Any) -> None:
        (request,) = requests
        promised[:] = [*request.promised]
        step(self, requests)
        most.append(max(held(e)))

    def watched_forward(self: PagedModel, *args: Any) -> Any:
        out = forward(self, *args)
        assert all(h <= p for h, p in zip(held(e), promised, strict=True))
        return out

    with (
        mock.patch.object(Search, "step", watched_step),
        mock.patch.object(PagedModel, "forward", watched_forward),
    ):
        e.generate([prompt], params)
    assert most


def request(
    prompt: int, params: SearchParams, *, tokens: int = 0, shared: int = 0, priority: int = 0
) -> Request:
    """A request; after a round if it has tokens, with as many hypotheses as it keeps."""
    made = Request([1] * prompt, [[1] * prompt, [1] * prompt], params, priority)
    if shared:
        _grow(made, shared, 1)
    if tokens:
        _grow(made, tokens - shared, params.kept)
    return made


def _grow(request: Request, tokens: int, kept: int) -> None:
    """A round in which every candidate grows by so many tokens, and the first ones are kept."""
    begin_rounds([request.beams])
    rows = len(request.beams.candidates)
    drawn = Draws.empty(tokens, rows, torch.device("cpu"))
    drawn.tokens.fill_(2)
    drawn.logprobs.zero_()
    assert not take_tokens([request.beams], drawn.memory.numpy(), rows, drawn.logprobs_at)
    end_rounds([request.beams], np.arange(kept)[None], [])


BASE, GUIDE = 0, 1  # among the models of a request


def test_the_pages_of_a_round() -> None:
    params = SearchParams(beam_width=2, successors=3, chunk_length=5, max_new_tokens=20)

    def pages(model: int, tokens: int = 0, shared: int = 0, prompt: int = 9) -> int:
        one = request(prompt, params, tokens=tokens, shared=shared)
        return round_pages([one.beams], [4, 4, 4])[0][model]

    # Round 1: the prompt's 2 full pages, and 1 + 4 tokens of each candidate behind them.
    assert pages(BASE) == 2 + 6 * 2
    assert pages(BASE, prompt=8) == 2 + 6 * 1
    # 8 tokens of the prompt, and the last one with the chunk but its last: 5 tokens.
    assert pages(GUIDE) == 2 + 6 * 2
    assert pages(GUIDE, prompt=8) == 1 + 6 * 2
    # 9 + 7 tokens: two pages of the prompt, two more of each history, and 4 tokens a candidate.
    assert pages(BASE, 7) == 2 + 2 * 2 + 6 * 1
    assert pages(GUIDE, 7) == 2 + 2 * 1 + 6 * 2
    # With 5 tokens of the response in common, the third page is shared, too.
    assert pages(BASE, 7, shared=3) == 3 + 2 * 1 + 6 * 1
    assert pages(BASE, 7, shared=2) == 2 + 2 * 2 + 6 * 1
    # The last rounds are shorter.
    assert pages(BASE, 18) == 2 + 2 * 4 + 6 * 1
    assert pages(BASE, 19) == 2 + 2 * 5 + 6 * 0


def scheduler(tokens: int, max_rows: int = 64) -> Scheduler:
    base = PagedModel(tiny_model(), kv_cache_tokens=tokens, page_size=4)
    return Scheduler([base], max_rows)


SMALL = SearchParams(method="sample", n=1, max_new_tokens=4)


def test_the_youngest_is_set_aside_and_comes_back_first() -> None:
    s = scheduler(4 * 20)
    params = SearchParams(beam_width=2, successors=2, chunk_length=4, max_new_tokens=40)
    first, second, third = (request(9, params) for _ in range(3))
    for r in (first, second, third):
        s.submit(r)
    assert s.choose().run == [first, second, third]  # 2 + 4 * 1 pages each

    def after(r: Request, tokens: int) -> None:
        r.beams = request(9, params, tokens=tokens).beams

    for r in (first, second, third):
        after(r, 4)
    chosen = s.choose()  # 2 + 2 * 1 + 4 * 1 pages each: two fit
    assert chosen.run == [first, second]
    assert chosen.set_aside == [third]
    after(first, 28)
    chosen = s.choose()  # 2 + 2 * 7 + 4 * 1: all there are
    assert chosen.run == [first]
    assert chosen.set_aside == [second]
    assert s.waiting == [second, third]
    s.remove(first)
    assert s.choose().run == [second, third]


def test_rows_are_bounded_but_one_request_may_have_more() -> None:
    s = scheduler(400, max_rows=8)
    wide = SearchParams(beam_width=4, successors=4, max_new_tokens=4)
    one, two, three = request(2, wide), request(2, SMALL), request(2, SMALL)
    for r in (one, two, three):
        s.submit(r)
    assert s.choose().run == [one]
    s.remove(one)
    assert s.choose().run == [two, three]


def test_priority_is_worth_so_many_steps() -> None:
    s = scheduler(4 * 4)
    low = request(9, SMALL, priority=1)
    s.submit(low)
    high = []
    for _ in range(ROUNDS_PER_PRIORITY):
        high.append(request(9, SMALL))
        s.submit(high[-1])
        (run,) = s.choose().run
        assert run in (high[-1], low)
        assert run is high[-1] or len(high) == ROUNDS_PER_PRIORITY
        if run is low:
            break
        s.remove(run)
    late = request(9, SMALL)
    s.submit(late)
    assert s.choose().run == [low]


@drawn(60)
@given(
    arrivals=st.lists(
        st.tuples(
            st.integers(0, 3),  # steps since the one before
            st.integers(1, 30),  # prompt
            st.integers(1, 4),  # W and K
            st.integers(1, 9),  # rounds
            st.integers(-1, 1),  # priority
        ),
        min_size=1,
        max_size=25,
    ),
    pages=st.integers(30, 90),
    max_rows=st.integers(1, 20),
)
def test_nobody_waits_for_ever(
    arrivals: list[tuple[int, int, int, int, int]], pages: int, max_rows: int
) -> None:
    """Requests come while others run; all of them end, and what runs always fits."""
    s = Scheduler([_base(pages)], max_rows)
    later = list(arrivals)
    left: dict[int, int] = {}
    wait = 0
    for _ in range(4000):
        while later and wait >= later[0][0]:
            _, prompt, width, rounds, priority = later.pop(0)
            params = SearchParams(
                beam_width=width, successors=width, chunk_length=4, max_new_tokens=4 * rounds
            )
            one = request(prompt, params, priority=priority)
            try:
                s.check(one)
            except ValueError:
                continue
            s.submit(one)
            left[id(one)] = rounds
            wait = 0
        wait += 1
        chosen = s.choose()
        assert sum(r.promised[0] for r in chosen.run) <= pages
        assert not set(map(id, chosen.run)) & set(map(id, [*chosen.set_aside, *s.waiting]))
        if left and not chosen.run:
            pytest.fail("requests wait, and none runs")
        urgent = min([*chosen.run, *s.waiting], key=lambda r: r.urgency, default=None)
        assert urgent is None or urgent in chosen.run  # every round ends with its step here
        for r in chosen.run:
            left[id(r)] -= 1
            kept = r.beams.kept
            tokens = len(kept[0].tokens) + 4 if kept else 4
            r.beams = request(len(r.prompt), r.params, tokens=tokens).beams
            if left[id(r)] == 0:
                s.remove(r)
                del left[id(r)]
        if not left and not later:
            return
    pytest.fail(f"{len(left)} requests never ended")


def _base(pages: int) -> PagedModel:
    if pages not in _bases:
        _bases[pages] = PagedModel(tiny_model(), kv_cache_tokens=4 * pages, page_size=4)
    return _bases[pages]


_bases: dict[int, PagedModel] = {}


def test_chunks_of_many_lengths_end_together() -> None:
    assert _step_tokens([]) == 0
    assert _step_tokens([0, 0]) == 0
    assert _step_tokens([5, 5, 0]) == 5
    assert _step_tokens([5, 7, 30]) == 7
    assert _step_tokens([5, 8]) == 5
    assert _step_tokens([1, 3, 4, 6]) == 4
    assert _step_tokens([30, 40]) == 16
    assert _step_tokens([1]) == 1


def test_guides_run_once_a_round_also_with_chunks_of_many_lengths() -> None:
    e = make_engine(*tiny_triple(eos=()))
    lengths = [4, 5, 6, 7, 9, 10]
    params = [replace(SEARCH, chunk_length=n, max_new_tokens=30) for n in lengths]
    prompts = [[1 + n, 2] for n in lengths]
    passes = 0
    score = GuideSide.score

    def counted(self: GuideSide, *args: Any) -> Any:
        nonlocal passes
        passes += 1
        return score(self, *args)

    with mock.patch.object(GuideSide, "score", counted):
        together = e.generate(prompts, params)
    assert passes <= 10  # and not 26, one for each different end of a chunk
    assert found(together) == found([e.generate([p], q)[0] for p, q in zip(prompts, params)])


def test_a_model_that_fails_ends_only_the_requests_under_way() -> None:
    e = make_engine(*tiny_triple(eos=()), max_rows=6)
    forward = PagedModel.forward
    calls = 0

    def failing(self: PagedModel, *args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise RuntimeError("the device is on fire")
        return forward(self, *args)

    with mock.patch.object(PagedModel, "forward", failing):
        results = e.generate(PROMPTS, SEARCH, on_error="return")
    failed = [r for r in results if r.error is not None]
    assert failed and len(failed) < len(results)
    assert all("on fire" in str(r.error) for r in failed)
    well = [i for i, r in enumerate(results) if r.error is None]
    expected = engine(eos=()).generate([PROMPTS[i] for i in well], SEARCH)
    assert found([results[i] for i in well]) == found(expected)
    assert_all_pages_free(e)
