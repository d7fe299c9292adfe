"""`method="beam"` finds what transformers' beam search finds, and what the definition says."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.support.beam_reference import ReferenceBeams, beam_search
from tests.support.broken_models import broken_triple
from tests.support.cohorts import in_cohorts
from tests.support.drawn import TIMES, drawn
from tests.support.engines import (
    LONG_PROMPTS,
    MIXED,
    PROMPTS,
    Floats,
    assert_all_pages_free,
    engine,
    found,
    make_engine,
)
from tests.support.recorded import Recorded, replays
from tests.support.reference import Reference
from tests.support.tiny_models import FAMILIES, VOCABULARY, tiny_model, tiny_triple
from w2s_fast import Engine, SearchParams, SearchResult
from w2s_fast._pages import advance_beams
from w2s_fast.errors import InvalidRequest, NumericalError
from w2s_fast.search.beam_side import likeliest

# Rounding may decide otherwise where two log-probs are as close as this: transformers adds them up
# in float32.
MARGIN = 1e-4
# Never; rarely, often and mostly at once.
EOS_SETS: tuple[tuple[int, ...], ...] = ((), (0,), (3, 7), (1, 4, 8, 11, 12))
PENALTIES = (1.0, 0.0, 2.0, -1.0, 0.5)
STOPPING: tuple[Any, ...] = (False, True, "never")

BEAM = SearchParams(method="beam", beam_width=4, max_new_tokens=12, n=4)
BEAMS = [
    BEAM,
    replace(BEAM, beam_width=2, n=1, early_stopping=True, max_new_tokens=9),
    replace(BEAM, beam_width=5, length_penalty=0.0, early_stopping="never", trace=True),
    replace(BEAM, beam_width=1, n=1, max_new_tokens=15),
    replace(BEAM, beam_width=3, n=2, ignore_eos=True, stop_token_ids=(4,), max_new_tokens=7),
]


@functools.cache
def engine_and_reference(
    family: str,
    eos: tuple[int, ...],
    page_size: int = 16,
    kv_cache_tokens: int = 4096,
    dtype: torch.dtype = torch.float64,
) -> tuple[Engine, Reference]:
    base = tiny_model(family, eos=eos, dtype=dtype)
    engine = Engine(
        base=base,
        guides=[],
        device="cpu",
        page_size=page_size,
        kv_cache_tokens=kv_cache_tokens,
    )
    return engine, Reference(base, [], vocab_size=VOCABULARY, eos_token_ids=eos)


def transformers_beams(
    model: Any, prompt: list[int], params: SearchParams, eos: Sequence[int]
) -> tuple[list[list[int]], list[float]]:
    """What `generate` returns: the new tokens of each sequence, and its score (not of one beam)."""
    ends = [*([] if params.ignore_eos else eos), *params.stop_token_ids]
    rows = torch.tensor([prompt])
    # One beam is greedy decoding there, and has no such settings.
    many: dict[str, Any] = {
        "length_penalty": params.length_penalty,
        "early_stopping": params.early_stopping,
    }
    out = model.generate(
        rows,
        attention_mask=torch.ones_like(rows),
        do_sample=False,
        num_beams=params.beam_width,
        num_return_sequences=params.n,
        max_new_tokens=params.max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **(many if params.beam_width > 1 else {}),
    )
    sequences = []
    for row in out.sequences[:, len(prompt) :].tolist():
        first = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
        sequences.append(row[: first + 1])
    return sequences, [] if params.beam_width == 1 else out.sequences_scores.tolist()


def assert_found(result: SearchResult, expected: ReferenceBeams) -> None:
    assert result.error is None
    assert len(result.hypotheses) == len(expected.hypotheses)
    for ours, theirs in zip(result.hypotheses, expected.hypotheses):
        assert ours.token_ids == theirs.token_ids
        assert ours.finish_reason == theirs.finish_reason
        assert ours.score == pytest.approx(theirs.score, abs=1e-4, rel=1e-5)
        assert ours.token_logprobs == pytest.approx(theirs.token_logprobs, abs=1e-4)
        assert ours.token_scores == []
    assert result.usage.sampled_tokens == expected.sampled_tokens
    assert result.usage.completion_tokens == sum(len(h.token_ids) for h in expected.hypotheses)
    assert result.usage.scored_tokens == 0


@st.composite
def beam_params(draw: st.DrawFn) -> SearchParams:
    width = draw(st.integers(1, 5))
    return SearchParams(
        method="beam",
        beam_width=width,
        n=draw(st.integers(1, width)),
        max_new_tokens=draw(st.integers(1, 14)),
        length_penalty=draw(st.sampled_from(PENALTIES)),
        early_stopping=draw(st.sampled_from(STOPPING)),
        stop_token_ids=draw(st.sampled_from([(), (), (2,), (5, 6)])),
        ignore_eos=draw(st.sampled_from([False, False, False, True])),
        # Which nothing depends on.
        temperature=draw(st.sampled_from([0.0, 0.7])),
        top_k=draw(st.sampled_from([1, 50])),
        seed=draw(st.integers(0, 9)),
    )


prompts = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=7)


@drawn(120)
@given(
    family=st.sampled_from(FAMILIES),
    eos=st.sampled_from(EOS_SETS),
    page_size=st.sampled_from([1, 3, 16]),
    dtype=st.sampled_from([torch.float64, torch.float64, torch.float32]),
    requests=st.lists(st.tuples(prompts, beam_params()), min_size=1, max_size=3),
)
def test_any_beam_search_finds_what_transformers_and_the_definition_find(
    family: str,
    eos: tuple[int, ...],
    page_size: int,
    dtype: torch.dtype,
    requests: list[tuple[list[int], SearchParams]],
) -> None:
    engine, reference = engine_and_reference(family, eos, page_size, dtype=dtype)
    expected = [beam_search(reference, prompt, params) for prompt, params in requests]
    room = 10 if dtype is torch.float32 else 1
    assume(all(one.margin > room * MARGIN for one in expected))
    results = engine.generate([p for p, _ in requests], [s for _, s in requests])
    for (prompt, params), result, own in zip(requests, results, expected, strict=True):
        assert_found(result, own)
        sequences, scores = transformers_beams(reference.base, prompt, params, eos)
        assert [h.token_ids for h in result.hypotheses] == sequences
        if scores:
            ours = [h.score for h in result.hypotheses]
            assert ours == pytest.approx(scores, abs=1e-4, rel=1e-5)


# Cases worth seeing by name, whatever hypothesis draws.
@pytest.mark.parametrize("early_stopping", STOPPING)
@pytest.mark.parametrize(
    "length_penalty",
    [*PENALTIES[:2], *(pytest.param(p, marks=pytest.mark.thorough) for p in PENALTIES[2:])],
)
@pytest.mark.parametrize("eos", EOS_SETS, ids=["never", "rare", "often", "early"])
def test_every_rule_of_ending_is_transformers(
    eos: tuple[int, ...], length_penalty: float, early_stopping: Any
) -> None:
    engine, reference = engine_and_reference("llama", eos)
    params = replace(
        BEAM, length_penalty=length_penalty, early_stopping=early_stopping, max_new_tokens=20
    )
    decided = 0
    for prompt, result in zip(PROMPTS[:3], engine.generate(PROMPTS[:3], params)):
        if decided == TIMES:
            break
        expected = beam_search(reference, prompt, params)
        if expected.margin < MARGIN:
            continue
        assert_found(result, expected)
        sequences, scores = transformers_beams(reference.base, prompt, params, eos)
        assert [h.token_ids for h in result.hypotheses] == sequences
        ours = [h.score for h in result.hypotheses]
        assert ours == pytest.approx(scores, abs=1e-4, rel=1e-5)
        decided += 1
    assert decided


def test_one_beam_is_greedy_decoding() -> None:
    e = engine()
    greedy = SearchParams(method="sample", temperature=0.0, max_new_tokens=12)
    for stopping in STOPPING:
        beam = replace(BEAM, beam_width=1, n=1, early_stopping=stopping)
        for ours, theirs in zip(e.generate(PROMPTS, beam), e.generate(PROMPTS, greedy)):
            assert ours.token_ids == theirs.token_ids
            assert ours.finish_reason == theirs.finish_reason


@pytest.mark.parametrize("length_penalty", PENALTIES)
def test_a_score_is_the_log_prob_over_a_power_of_the_length(length_penalty: float) -> None:
    params = replace(BEAM, length_penalty=length_penalty)
    for result in engine().generate(PROMPTS, params):
        scores = []
        for h in result.hypotheses:
            scores.append(sum(h.token_logprobs) / len(h.token_ids) ** length_penalty)
            assert h.score == pytest.approx(scores[-1], abs=1e-9)
        assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("length_penalty", [1e30, -1e30])
def test_a_penalty_beyond_all_numbers_ranks_by_length_and_gives_no_nan(
    length_penalty: float,
) -> None:
    for result in engine().generate(PROMPTS, replace(BEAM, length_penalty=length_penalty)):
        assert result.error is None
        assert all(h.score is not None and not math.isnan(h.score) for h in result.hypotheses)


def test_alone_and_among_requests_of_other_methods() -> None:
    e = engine()
    alone = [e.generate([p], params)[0] for p, params in zip(PROMPTS, BEAMS, strict=True)]
    others = e.generate(PROMPTS, MIXED)
    together = e.generate(
        [prompt for prompt in PROMPTS for _ in range(2)],
        [params for pair in zip(BEAMS, MIXED, strict=True) for params in pair],
    )
    assert found(together[::2]) == found(alone)
    assert found(together[1::2]) == found(others)
    assert_scores(together[::2], alone)


def assert_scores(results: Sequence[SearchResult], expected: Sequence[SearchResult]) -> None:
    for ours, theirs in zip(results, expected, strict=True):
        assert Floats([h.score or 0.0 for h in ours.hypotheses]) == Floats(
            [h.score or 0.0 for h in theirs.hypotheses]
        )


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_in_too_few_pages_for_all_they_find_the_same(page_size: int) -> None:
    e = make_engine(*tiny_triple(eos=(0, 6, 13)), page_size=page_size, kv_cache_tokens=176)
    results = e.generate(PROMPTS * 2, BEAMS * 2)
    assert found(results) == found(engine().generate(PROMPTS * 2, BEAMS * 2))
    assert e.stats().set_aside > 0
    assert_all_pages_free(e)


@pytest.mark.parametrize("page_size", [1, 3, 4])
@pytest.mark.parametrize("width", [1, 2, 5])
def test_no_round_takes_more_pages_than_it_was_promised(width: int, page_size: int) -> None:
    e = make_engine(*tiny_triple(eos=()), page_size=page_size, prefix_cache=False)
    params = replace(BEAM, beam_width=width, n=1, max_new_tokens=13)
    used: list[tuple[int, int]] = []

    def advance(beams: Any, tokens: Any, logprobs: Any, manager: Any, ended: Any) -> Any:
        """Between the pass and the fork, and behind that: there it has the most."""
        (request,) = e._scheduler.running
        before = manager.used_pages
        copies = advance_beams(beams, tokens, logprobs, manager, ended)
        used.append((max(before, manager.used_pages), request.promised[0]))
        return copies

    with mock.patch("w2s_fast.search.beam_side.advance_beams", advance):
        for prompt in PROMPTS:
            e.generate([prompt], params)
    assert len(used) == 13 * len(PROMPTS)
    assert all(pages <= promised for pages, promised in used)
    assert any(pages == promised for pages, promised in used)


def test_prompts_are_found_again() -> None:
    e = make_engine(*tiny_triple(eos=(0, 6, 13)))
    cold = e.generate(LONG_PROMPTS, BEAMS)
    before = e.stats().pools["base"].cache_hit_tokens
    warm = e.generate(LONG_PROMPTS, BEAMS)
    assert e.stats().pools["base"].cache_hit_tokens >= before + 5 * 36
    assert all(r.stats is not None and r.stats.cached_tokens >= 36 for r in warm)
    assert found(warm) == found(cold) == found(engine().generate(LONG_PROMPTS, BEAMS))
    assert_all_pages_free(e)


@pytest.mark.parametrize("params", BEAMS, ids=range(len(BEAMS)))
def test_a_stream_gives_out_what_all_that_can_win_agree_on(params: SearchParams) -> None:
    e = engine()
    early = 0
    for prompt, expected in zip(PROMPTS, e.generate(PROMPTS, params), strict=True):
        pieces = list(e.stream(prompt, params))
        assert [token for piece in pieces for token in piece.token_ids] == expected.token_ids
        assert pieces[-1].result is not None
        assert found([pieces[-1].result]) == found([expected])
        early += len(pieces) > 1
    assert early > 0


@pytest.mark.parametrize("cohorts", [1, 2])
def test_ahead_and_in_cohorts_they_find_the_same(cohorts: int) -> None:
    expected = engine().generate(PROMPTS * 2, [*BEAMS, *MIXED])
    e = in_cohorts(make_engine(*tiny_triple(eos=(0, 6, 13))), cohorts)
    assert found(e.generate(PROMPTS * 2, [*BEAMS, *MIXED])) == found(expected)
    assert_all_pages_free(e)


def test_recorded_passes_find_the_same() -> None:
    triple = tiny_triple(eos=(0, 6), dtype=torch.float32)
    expected = make_engine(*triple).generate(PROMPTS, BEAMS)
    recorded = Recorded.of(triple)
    for _ in range(3):
        assert found(recorded.engine.generate(PROMPTS, BEAMS)) == found(expected)
    assert replays(recorded.passes[0]) > 20
    assert_all_pages_free(recorded.engine)


def test_a_trace_shows_where_every_beam_comes_from() -> None:
    params = replace(BEAM, beam_width=3, n=3, trace=True)
    for result in engine().generate(PROMPTS, params):
        assert result.trace is not None
        before: list[list[int]] = []
        for one in result.trace.rounds:
            kept = [one.candidates[i] for i in one.kept]
            for candidate in one.candidates:
                parent = [] if candidate.parent is None else before[candidate.parent]
                assert candidate.token_ids[: len(parent)] == parent
                assert len(candidate.token_ids) <= len(parent) + 1
            going_on = [c.score or 0.0 for c in kept if c.finish_reason is None]
            ended = [c.score or 0.0 for c in kept if c.finish_reason is not None]
            assert len(going_on) <= 3
            assert len(ended) <= 3
            for scores in (going_on, ended):
                assert scores == sorted(scores, reverse=True)
            before = [c.token_ids for c in kept]
        assert before == [h.token_ids for h in result.hypotheses]
        assert result.stats is not None
        assert result.stats.rounds == len(result.trace.rounds)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_number_ends_its_own_request_and_no_other(value: float) -> None:
    token = 7
    triple = tiny_triple(("llama", "llama", "llama"), eos=(), dtype=torch.float32)
    params = replace(BEAM, beam_width=2, n=2, max_new_tokens=8, trace=True)
    prompts = [[i, 3] for i in range(VOCABULARY)] + [[token, 1]]
    expected = make_engine(*triple).generate(prompts, params)
    bad = make_engine(*broken_triple(triple, "base", token, value))
    results = bad.generate(prompts, params, on_error="return")
    broken = 0
    for prompt, result, sound in zip(prompts, results, expected):
        assert sound.trace is not None
        # The tokens of the last round are not run.
        kept = [one.candidates[i] for one in sound.trace.rounds[:-1] for i in one.kept]
        at = [c.token_ids.index(token) for c in kept if token in c.token_ids]
        if token in prompt or at:
            assert isinstance(result.error, NumericalError)
            position = 0 if token in prompt else min(at) + 1
            assert f"'base' gave NaN or infinity at position {position} " in str(result.error)
            broken += 1
        else:
            assert found([result]) == found([sound])
    assert 2 < broken < len(prompts)
    assert_all_pages_free(bad)


@pytest.mark.parametrize(
    "values",
    [
        {"n": 5},
        {"early_stopping": "sometimes"},
        {"early_stopping": 1},
        {"early_stopping": None},
        {"length_penalty": math.nan},
        {"length_penalty": "1"},
        {"proposal": "fusion"},
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_by_name(values: dict[str, Any]) -> None:
    (name,) = values
    with pytest.raises(InvalidRequest, match=f"{name} is "):
        replace(BEAM, **values)


def test_more_beams_than_tokens_find_all_responses_that_there_are() -> None:
    e = engine(eos=())
    params = replace(BEAM, beam_width=30, n=30, max_new_tokens=1)
    for result in e.generate(PROMPTS, params):
        assert {h.token_ids[0] for h in result.hypotheses} == set(range(VOCABULARY))
        logprobs = [h.token_logprobs[0] for h in result.hypotheses]
        assert math.fsum(map(math.exp, logprobs)) == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_likeliest_tokens_have_the_log_probs_of_a_softmax(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(70, 300, generator=generator)).to(dtype)[:, :211]
    packed = likeliest(logits, 9)
    expected = logits.float().log_softmax(1)
    # Of equal ones, of which bfloat16 has many, the lowest token comes first.
    order = expected.argsort(dim=1, descending=True, stable=True)[:, :9]
    assert packed[0].tolist() == order.tolist()
    torch.testing.assert_close(packed[1].view(torch.float32), expected.gather(1, order))


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf])
def test_a_row_with_a_broken_logit_has_no_log_probs(value: float) -> None:
    logits = torch.zeros(3, 20)
    logits[1, 4] = value
    logits[2, 5:] = -math.inf
    found = likeliest(logits, 7)[1].view(torch.float32)
    assert found[1].isnan().all()
    assert found[0].tolist() == pytest.approx([-math.log(20)] * 7)
    assert found[2].tolist() == pytest.approx([-math.log(5)] * 5 + [-math.inf] * 2)
