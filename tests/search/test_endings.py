"""EOS, stop tokens and length end a response, and count as they should."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support.engines import (
    PROMPTS,
    engine,
    make_engine,
)
from tests.support.reference import Reference, ReferenceGuide
from tests.support.results import assert_same
from tests.support.tiny_models import (
    VOCABULARY,
    tiny_triple,
)
from w2s_fast import SearchParams


def test_eos_has_a_share_in_the_score_only_where_it_was_sampled() -> None:
    e = engine()
    params = SearchParams(beam_width=3, successors=3, chunk_length=2, max_new_tokens=6, n=3)
    reasons = set()
    for seed in range(6):
        for prompt, result in zip(
            PROMPTS, e.generate(PROMPTS, replace(params, seed=seed)), strict=True
        ):
            for h in result.hypotheses:
                reasons.add(h.finish_reason)
                assert len(h.token_scores) == len(h.token_logprobs) == len(h.token_ids)
                assert h.score == pytest.approx(sum(h.token_scores), abs=1e-6)
                assert h.score == pytest.approx(e.score([prompt], [h.token_ids])[0], abs=1e-4)
                ends = h.token_ids[-1] in (0, 6, 13)
                assert ends == (h.finish_reason == "eos")
                assert not set(h.token_ids[:-1]) & {0, 6, 13}
                if h.finish_reason == "length":
                    assert len(h.token_ids) == 6
                    with_eos = e.score([prompt], [[*h.token_ids, 0]])[0]
                    assert abs(with_eos - h.score) > 1e-3  # an EOS term would have been seen
    assert reasons == {"eos", "length"}


def test_eos_comes_before_a_stop_token_and_either_before_length() -> None:
    always = SearchParams(
        method="sample", n=200, max_new_tokens=1, temperature=9.0, top_k=0, stop_token_ids=(6, 9)
    )
    (result,) = engine().generate([[4]], always)
    for h in result.hypotheses:
        token = h.token_ids[0]
        expected = "eos" if token in (0, 6, 13) else "stop" if token == 9 else "length"
        assert h.finish_reason == expected
    assert {h.finish_reason for h in result.hypotheses} == {"eos", "stop", "length"}
    (ignoring,) = engine().generate([[4]], replace(always, ignore_eos=True))
    for ours, h in zip(ignoring.hypotheses, result.hypotheses, strict=True):
        assert ours.token_ids == h.token_ids
        assert ours.finish_reason == ("stop" if ours.token_ids[0] in (6, 9) else "length")


@pytest.mark.parametrize("chunk_length", [1, 5, 9, 10, 11, None])
def test_a_response_never_grows_beyond_max_new_tokens(chunk_length: int | None) -> None:
    e = engine(eos=())
    params = SearchParams(
        beam_width=2, successors=2, chunk_length=chunk_length, max_new_tokens=10, trace=True
    )
    for result in e.generate(PROMPTS, params):
        assert result.finish_reason == "length"
        assert len(result.token_ids) == 10
        assert result.trace is not None
        length = chunk_length or 10
        assert [len(r.candidates[0].token_ids) for r in result.trace.rounds] == [
            *range(length, 10, length),
            10,
        ]


def test_long_chunks_and_responses_equal_the_reference() -> None:
    # Longer than any number of tokens that is handled at once.
    triple = tiny_triple(eos=(0,), seed=2)
    e = make_engine(*triple)
    reference = Reference(
        triple.base, [ReferenceGuide(*triple[1:])], vocab_size=VOCABULARY, eos_token_ids=[0]
    )
    lengths = set()
    for seed, chunk_length in enumerate((33, 17, None, 40, 16)):
        params = SearchParams(
            beam_width=2, successors=2, chunk_length=chunk_length, max_new_tokens=70, trace=True,
            temperature=0.5, seed=seed,
        )  # fmt: skip
        expected = reference.search([5, 11], params)
        lengths |= {len(c.token_ids) for r in expected.rounds for c in r.candidates}
        assert_same(e.generate([[5, 11]], params)[0], expected)
    assert max(lengths) > 34
    assert min(lengths) < 16
