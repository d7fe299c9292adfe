"""Widths by round find what the definition says, and what a width gives up is free at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.search.test_reference import EOS_SETS, engine_and_reference, prompts
from tests.support.drawn import drawn
from tests.support.engines import assert_all_pages_free, found, make_engine
from tests.support.results import assert_all_found, assert_same, decided
from tests.support.tiny_models import tiny_triple
from w2s_fast import Engine, SearchParams
from w2s_fast._pages import round_pages, round_rows
from w2s_fast.errors import InvalidRequest
from w2s_fast.scheduling.footprint import pages_at_most
from w2s_fast.search import Search

SPECULATIVE = {"beam_width": (8, 4, 2, 1), "successors": 1, "chunk_length": 3}
TREE = {"beam_width": (3, 1), "successors": (2, 4), "chunk_length": (4, 2)}
GROWING = {"beam_width": (1, 2, 4), "successors": (1, 3), "chunk_length": (1, 5, None)}


def some(most: int, least: int = 1) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(least, most), min_size=1, max_size=4)


@st.composite
def by_round(draw: st.DrawFn) -> SearchParams:
    lengths = st.sampled_from([2, 1, 3, 5, None])
    values: dict[str, Any] = {
        "beam_width": draw(st.one_of(st.integers(1, 3), some(4))),
        "successors": draw(st.one_of(st.integers(1, 3), some(3))),
        "chunk_length": draw(st.one_of(lengths, st.lists(lengths, min_size=1, max_size=4))),
        "max_new_tokens": draw(st.sampled_from([12, 10, 7, 1])),
    }
    last = SearchParams(**values).last_shape.kept
    return SearchParams(
        **values,
        n=draw(st.integers(1, last)),
        temperature=draw(st.sampled_from([0.7, 1.5, 0.0])),
        top_k=draw(st.sampled_from([0, 5])),
        seed=draw(st.integers(0, 99)),
        stop_token_ids=draw(st.sampled_from([(), (5, 0)])),
        ignore_eos=draw(st.booleans()),
        trace=True,
        finished=draw(st.sampled_from(["hold", "replicate"])),
        dedup=draw(st.booleans()),
        score=draw(st.sampled_from(["sum", "mean"])),
    )


@drawn(50)
@given(
    eos=st.sampled_from(EOS_SETS),
    page_size=st.sampled_from([1, 16]),
    requests=st.lists(st.tuples(prompts, by_round()), min_size=1, max_size=3),
)
def test_any_widths_find_what_the_reference_finds(
    eos: tuple[int, ...], page_size: int, requests: list[tuple[list[int], SearchParams]]
) -> None:
    engine, reference = engine_and_reference("llama", eos, (1.0,), page_size)
    results = assert_all_found(engine, reference, requests)
    for (prompt, params), result in zip(requests, results, strict=True):
        (alone,) = engine.generate([prompt], params)
        assert found([alone]) == found([result])


@drawn(25)
@given(
    params=by_round(),
    seeds=st.lists(st.integers(0, 99), min_size=2, max_size=4),
)
def test_any_widths_in_too_few_pages_find_the_same(params: SearchParams, seeds: list[int]) -> None:
    # Room for one request of the largest kind, 12 rows of 12 tokens and one page, and no more.
    engine, reference = engine_and_reference("llama", EOS_SETS[2], (1.0,), 2, 176)
    requests = [SearchParams(**{**vars(params), "seed": seed}) for seed in seeds]
    assert_all_found(engine, reference, [([3, 5, 7, 2], p) for p in requests])


@pytest.mark.parametrize("values", [SPECULATIVE, TREE, GROWING], ids=["rejection", "tree", "wider"])
@pytest.mark.parametrize("page_size", [1, 16])
def test_published_settings_find_what_the_reference_finds(
    values: dict[str, Any], page_size: int
) -> None:
    engine, reference = engine_and_reference("llama", (0,), (1.0,), page_size)
    params = SearchParams(**values, max_new_tokens=14, trace=True, seed=3)
    expected = reference.search([4, 9, 1], params)
    assert decided(expected)
    (result,) = engine.generate([[4, 9, 1]], params)
    assert_same(result, expected)
    assert result.trace is not None
    widths = params.widths.kept
    for number, one in enumerate(result.trace.rounds):
        width = widths[min(number, len(widths) - 1)]
        assert len(one.kept) == min(width, len(one.candidates))


@drawn(60)
@given(
    params=by_round(), prompt=st.integers(1, 20), page_size=st.sampled_from([1, 4, 16]),
    eos=st.sampled_from(EOS_SETS),
)  # fmt: skip
def test_no_round_is_promised_more_pages_or_rows_than_a_request_was_checked_for(
    params: SearchParams, prompt: int, page_size: int, eos: tuple[int, ...]
) -> None:
    engine, _ = engine_and_reference("llama", eos, (1.0,), page_size)
    request = engine.make_request([p % 18 + 1 for p in range(prompt)], params)
    models = range(len(request.prompts))
    most = [pages_at_most(request, of, page_size) for of in models]
    while not request.done:
        if not request.in_round:
            (pages,) = round_pages([request.beams], [page_size] * 3)
            assert all(p <= m for p, m in zip(pages, most))
            assert round_rows([request.beams])[0] <= params.rows
        engine._search.step([request])
    engine._search.abort(request)


def steps_of(engine: Engine, params: SearchParams, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many requests took part in each step, where a small one waits behind one of these."""
    counts: list[int] = []
    step = Search.step

    def watched(self: Search, requests: Any) -> None:
        counts.append(len(requests))
        step(self, requests)

    small = SearchParams(beam_width=3, successors=2, chunk_length=4, max_new_tokens=4)
    with monkeypatch.context() as patch:
        patch.setattr(Search, "step", watched)
        engine.generate([[1, 2, 3], [4, 5]], [params, small])
    return counts


@pytest.mark.parametrize("room", [{"max_rows": 8}, {"kv_cache_tokens": 100}], ids=["rows", "pages"])
def test_a_falling_width_lets_others_in_at_once(
    room: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(*tiny_triple(eos=()), prefix_cache=False, **room)
    params = SearchParams(beam_width=(8, 1), successors=1, chunk_length=4, max_new_tokens=16)
    # In the second round all that the first one kept still grow; it keeps one of them.
    assert steps_of(engine, params, monkeypatch) == [1, 1, 2, 1]
    if "max_rows" in room:
        constant = replace(params, beam_width=8)
        assert steps_of(engine, constant, monkeypatch) == [1, 1, 1, 1, 1]
    assert_all_pages_free(engine)


def test_widths_that_no_round_has_pages_for_are_refused() -> None:
    engine = make_engine(*tiny_triple(eos=()), kv_cache_tokens=400)
    ok = SearchParams(beam_width=(2, 8), successors=(1, 4), chunk_length=4, max_new_tokens=12)
    engine.generate([[1, 2]], ok)
    with pytest.raises(InvalidRequest, match=r"tokens of KV cache .* allowed: .*fewer candidates"):
        engine.generate([[1, 2]], replace(ok, beam_width=(2, 8, 40), successors=(1, 4, 8)))
