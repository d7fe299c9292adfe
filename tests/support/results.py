"""What the engine found, held against what the reference found."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import assume

from tests.support.reference import Reference, ReferenceResult
from w2s_fast import Engine, SearchParams, SearchResult

# Rounding may decide otherwise where a draw or two scores are as close as this; eager attention
# has its softmax in float32 whatever the model's type.
MARGIN = 2e-5


def decided(expected: ReferenceResult) -> bool:
    """Whether no draw and no selection hung on rounding."""
    return expected.draw_margin > MARGIN and expected.score_margin > MARGIN


def assert_all_found(
    engine: Engine, reference: Reference, asked: Sequence[tuple[list[int], SearchParams]]
) -> list[SearchResult]:
    """Asked together, an engine finds what the reference finds for each; where rounding decides,
    the test's example is put aside."""
    expected = [reference.search(prompt, params) for prompt, params in asked]
    assume(all(decided(one) for one in expected))
    results = engine.generate([prompt for prompt, _ in asked], [params for _, params in asked])
    for result, reference_result in zip(results, expected, strict=True):
        assert_same(result, reference_result)
    return results


def assert_same(result: SearchResult, expected: ReferenceResult, atol: float = 1e-4) -> None:
    """Everything a result holds against everything the reference found."""

    def close(ours: float | None, theirs: float | None) -> bool:
        if ours is None or theirs is None:
            return ours is theirs
        return abs(ours - theirs) <= atol

    assert result.error is None
    assert result.trace is not None
    for number, (ours, theirs) in enumerate(zip(result.trace.rounds, expected.rounds, strict=True)):
        assert len(ours.candidates) == len(theirs.candidates), number
        for index, (a, b) in enumerate(zip(ours.candidates, theirs.candidates, strict=True)):
            where = f"round {number}, candidate {index}"
            assert a.token_ids == b.token_ids, where
            assert a.parent == b.parent, where
            assert a.finish_reason == b.finish_reason, where
            assert close(a.score, b.score), f"{where}: {a.score} {b.score}"
        assert list(ours.kept) == theirs.kept, number
    assert len(result.hypotheses) == len(expected.hypotheses)
    for ours_h, theirs_h in zip(result.hypotheses, expected.hypotheses, strict=True):
        assert ours_h.text is None
        assert ours_h.token_ids == theirs_h.token_ids
        assert ours_h.finish_reason == theirs_h.finish_reason
        assert close(ours_h.score, theirs_h.score)
        assert ours_h.token_scores == pytest.approx(theirs_h.token_scores, abs=atol)
        assert ours_h.token_logprobs == pytest.approx(theirs_h.token_logprobs, abs=atol)
    best = expected.hypotheses[0]
    assert result.token_ids == best.token_ids
    assert result.finish_reason == best.finish_reason
    usage = result.usage
    assert usage.prompt_tokens == expected.prompt_tokens
    assert usage.completion_tokens == expected.completion_tokens
    assert usage.sampled_tokens == expected.sampled_tokens
    assert usage.scored_tokens == expected.scored_tokens
