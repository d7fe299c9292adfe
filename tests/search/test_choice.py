"""Scorers, resampling and choices of the caller's keep what the definition says."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.search.test_reference import EOS_SETS, guide_models, prompts
from tests.support.drawn import drawn
from tests.support.engines import PROMPTS, SEARCH, assert_all_pages_free, found, make_engine, quiet
from tests.support.reference import Reference, ReferenceGuide
from tests.support.results import assert_all_found
from tests.support.tiny_models import VOCABULARY, tiny_model, tiny_triple
from w2s_fast import Engine, Guide, ScoredCandidate, SearchParams
from w2s_fast.errors import InvalidRequest, ScorerFailure
from w2s_fast.kernels.noise import seed_bits, uniform, uniform_of_round
from w2s_fast.search.choice import ranked, resampled

# Of a response's tokens, and whether it has ended. Few texts should have the same value by chance.
Value = Callable[[list[int], bool], float]


def by_tokens(tokens: list[int], ended: bool) -> float:
    return sum((7 * t + i) % 11 for i, t in enumerate(tokens, 1)) / 9 - 0.123 * ended


def by_length(tokens: list[int], ended: bool) -> float:
    return 1.7 / len(tokens) + 0.01 * tokens[-1]


def as_scorer(value: Value) -> Any:
    return lambda candidates: [value(c.token_ids, c.finished) for c in candidates]


SCORERS = [(by_tokens, 1.0), (by_length, -2.5)]


@functools.cache
def both(
    eos: tuple[int, ...], guides: bool, scorers: int, page_size: int, tokens: int = 4096
) -> tuple[Engine, Reference]:
    base = tiny_model("llama", eos=eos)
    models = guide_models((1.0,), torch.float64) if guides else []
    engine = Engine(
        base=base,
        guides=[Guide(tuned=t, untuned=u, weight=w) for t, u, w in models],
        scorers=[(as_scorer(value), weight) for value, weight in SCORERS[:scorers]],
        device="cpu",
        page_size=page_size,
        kv_cache_tokens=tokens,
    )
    reference = Reference(
        base,
        [ReferenceGuide(t, u, w) for t, u, w in models],
        vocab_size=VOCABULARY,
        eos_token_ids=eos,
        scorers=SCORERS[:scorers],
    )
    return engine, reference


@st.composite
def some_params(draw: st.DrawFn) -> SearchParams:
    method = draw(st.sampled_from(["cbs", "cbs", "bon"]))
    width, successors = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    return SearchParams(
        method=method,
        beam_width=width,
        successors=successors,
        chunk_length=draw(st.sampled_from([2, 1, 3, 5, None])),
        max_new_tokens=draw(st.sampled_from([12, 10, 7, 1])),
        temperature=draw(st.sampled_from([0.7, 1.5])),
        top_k=draw(st.sampled_from([0, 5])),
        seed=draw(st.integers(0, 2**64 - 1)),
        ignore_eos=draw(st.booleans()),
        n=draw(st.integers(1, width if method == "cbs" else successors)),
        trace=True,
        finished=draw(st.sampled_from(["hold", "replicate"])),
        dedup=draw(st.booleans()),
        score=draw(st.sampled_from(["sum", "mean"])),
        selection=draw(st.sampled_from(["top", "resample"])),
        tau=draw(st.sampled_from([1.0, 0.3, 5.0])),
    )


@drawn(60)
@given(
    eos=st.sampled_from(EOS_SETS[1:]),
    sides=st.sampled_from([(True, 2), (True, 0), (False, 1)]),
    page_size=st.sampled_from([1, 3, 16]),
    requests=st.lists(st.tuples(prompts, some_params()), min_size=1, max_size=3),
)
def test_any_choice_is_that_of_the_reference(
    eos: tuple[int, ...],
    sides: tuple[bool, int],
    page_size: int,
    requests: list[tuple[list[int], SearchParams]],
) -> None:
    engine, reference = both(eos, *sides, page_size)
    # One candidate is nobody's choice, and needs guides no more than scorers.
    assert_all_found(engine, reference, requests)
    assert quiet(engine)


@drawn(25)
@given(
    sides=st.sampled_from([(True, 2), (True, 0)]),
    params=some_params(),
    seeds=st.lists(st.integers(0, 99), min_size=2, max_size=4),
)
def test_any_choice_in_too_few_pages_is_the_same(
    sides: tuple[bool, int], params: SearchParams, seeds: list[int]
) -> None:
    """Copies find the room that was promised them, and requests that are set aside their copies."""
    engine, reference = both(EOS_SETS[2], *sides, 2, 176)
    requests = [replace(params, seed=seed) for seed in seeds]
    assert_all_found(engine, reference, [([3, 5, 7, 2], p) for p in requests])


def test_copies_of_a_candidate_go_on_by_themselves() -> None:
    """As often as its value says, with noise and pages of their own; all are free at the end."""
    engine = make_engine(*tiny_triple(eos=()), page_size=4, prefix_cache=False)
    params = replace(SEARCH, beam_width=4, successors=2, selection="resample", tau=1e-9, n=4)
    (result,) = engine.generate([[1, 2, 3]], params)
    assert result.trace is not None
    first, second, *_ = result.trace.rounds
    values = [candidate.score for candidate in first.candidates]
    assert first.kept == [int(np.argmax(values))] * 4
    assert [candidate.parent for candidate in second.candidates] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len({tuple(c.token_ids) for c in second.candidates}) > 1
    assert_all_pages_free(engine)


def test_systematic_resampling_by_hand() -> None:
    # Shares 1/2, 1/4, 1/4 of the points 0.1, 0.35, 0.6, 0.85.
    values = np.log([2.0, 1.0, 1.0])
    assert resampled(values, 4, 1.0, 0.4).tolist() == [0, 0, 1, 2]
    assert resampled(values[::-1], 4, 1.0, 0.4).tolist() == [2, 2, 0, 1]
    # With tau 1/2 they are 2/3, 1/6 and 1/6.
    assert resampled(values, 3, 0.5, 0.999).tolist() == [0, 0, 2]
    assert resampled(np.array([0.0, 800.0]), 3, 1e-6, 0.999).tolist() == [1, 1, 1]
    assert ranked(np.array([1.0, np.nan, 3.0, 1.0, np.inf])).tolist() == [2, 0, 3, 1, 4]


def test_no_candidate_is_drawn_more_or_less_often_than_its_share() -> None:
    values = np.array([0.3, -1.0, 2.0, 0.0, 1.2])
    shares = np.exp(values) / np.exp(values).sum()
    counts = np.zeros(5)
    for seed in range(2000):
        drawn = np.bincount(resampled(values, 4, 1.0, uniform_of_round(seed, 1)), minlength=5)
        assert (np.abs(drawn - 4 * shares) < 1).all()
        counts += drawn
    # Four standard deviations of a rounding to one or the other side.
    assert np.abs(counts / 2000 - 4 * shares).max() < 4 * 0.5 / 2000**0.5


def test_what_resamples_a_round_is_nobody_elses_noise() -> None:
    """Neither a token's, nor another round's or seed's."""
    seeds = [0, 7, 2**63, 2**64 - 1]
    rounds = {
        uniform_of_round(seed_bits(seed), number) for seed in seeds for number in range(1, 99)
    }
    assert len(rounds) == 4 * 98
    grid = torch.cartesian_prod(
        torch.tensor([seed_bits(seed) for seed in seeds]), torch.arange(99), torch.arange(99)
    )
    assert rounds.isdisjoint(uniform(*grid.unbind(1)).tolist())


def test_a_choice_of_ones_own_keeps_what_it_says() -> None:
    seen: list[tuple[list[float], list[ScoredCandidate]]] = []

    def last_two(values: Sequence[float], candidates: Sequence[ScoredCandidate]) -> list[int]:
        seen.append((list(values), list(candidates)))
        return [len(values) - 1, len(values) - 2]

    engine = make_engine(*tiny_triple(eos=()), scorers=[(as_scorer(by_tokens), 0.5)])
    params = replace(SEARCH, beam_width=3, selection=last_two, score="mean", n=2)
    (result,) = engine.generate([PROMPTS[0]], params)
    assert result.trace is not None
    assert [one.kept for one in result.trace.rounds] == [[8, 7], [5, 4], [5, 4], [5, 4]]
    for (values, candidates), one in zip(seen, result.trace.rounds, strict=True):
        assert values == [candidate.score for candidate in one.candidates]
        assert [c.token_ids for c in candidates] == [c.token_ids for c in one.candidates]
        assert {c.finished for c in candidates} == {one is result.trace.rounds[-1]}
        assert all(c.prompt == PROMPTS[0] and c.text is None for c in candidates)


@pytest.mark.parametrize(
    ("choice", "told"),
    [
        (lambda values, seen: [0] * 3, r"\[0, 0, 0\]; allowed: 1 to 2 indices below 6"),
        (lambda values, seen: [], "1 to 2 indices"),
        (lambda values, seen: [6], r"gave \[6\]"),
        (lambda values, seen: [-1], r"gave \[-1\]"),
        (lambda values, seen: [0.5], "allowed: indices"),
        (lambda values, seen: None, "None; allowed: indices"),
        (lambda values, seen: 1 // 0, "the choice failed: ZeroDivisionError"),
        (lambda values, seen: (1 // 0 for _ in seen), "the choice failed: ZeroDivisionError"),
    ],
)
def test_a_choice_that_makes_no_sense_is_its_requests_error(choice: Any, told: str) -> None:
    engine = make_engine(*tiny_triple(eos=()), prefix_cache=False)
    bad, good = engine.generate(
        PROMPTS[:2], [replace(SEARCH, selection=choice), SEARCH], on_error="return"
    )
    assert isinstance(bad.error, ScorerFailure)
    with pytest.raises(ScorerFailure, match=told):
        raise bad.error
    assert found([good]) == found(engine.generate([PROMPTS[1]], SEARCH))
    assert_all_pages_free(engine)


@pytest.mark.parametrize(
    "values",
    [
        {"selection": "best"},
        {"selection": None},
        {"selection": ["top"]},
        {"method": "sample", "selection": "resample"},
        {"tau": 0},
        {"tau": float("nan")},
        {"tau": -1.0},
    ],
    ids=str,
)
def test_bad_selections_are_refused_by_name(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=[*values][-1]):
        SearchParams(**values)


def test_equal_candidates_are_kept_once_where_that_is_asked_for() -> None:
    engine, _ = both((), True, 1, 4)
    params = replace(SEARCH, temperature=0.0, dedup=True, beam_width=3, n=3)
    (result,) = engine.generate([PROMPTS[0]], params)
    assert len(result.hypotheses) == 1
