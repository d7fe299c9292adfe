"""select_beams against the selection written naively, and its rules one by one."""

from __future__ import annotations

import math

import torch
from hypothesis import given

from tests.kernels.beams import RoundOfOne, check, run, some_rounds


def plain(scores: list[float], **changes: object) -> RoundOfOne:
    """Candidates of one token each, with these scores."""
    count = len(scores)
    fields: dict[str, object] = {
        "chunks": [(i,) for i in range(count)],
        "siblings": [0] * count,
        "previous": [0.0] * count,
        "before": [1] * count,
        "parents": list(range(count)),
        "tuned": [[[x] for x in scores]],
        "untuned": [[[0.0] for _ in scores]],
        "width": 2,
        "mean": False,
        "dedup": False,
    }
    return RoundOfOne(**{**fields, **changes})  # type: ignore[arg-type]


@given(some_rounds())
def test_any_round_agrees_with_the_naive_selection(drawn):
    check(*drawn)


def test_equal_scores_go_to_the_lower_index():
    found = run([plain([1.0, 2.0, 2.0, 2.0])], [1.0])
    assert found.kept.tolist() == [[1, 2]]


def test_a_held_hypothesis_keeps_its_score_and_its_place():
    held = plain(
        [0.0, 5.0], chunks=[(), (1,)], tuned=[[[], [5.0]]], untuned=[[[], [0.0]]], previous=[9.0, 0]
    )
    found = run([held], [1.0])
    assert found.scores.tolist() == [9.0, 5.0]
    assert found.kept.tolist() == [[0, 1]]


def test_requests_with_other_widths_and_counts_do_not_touch_each_other():
    wide, narrow = plain([1.0, 4.0, 3.0], width=3), plain([7.0, 8.0], width=1)
    assert run([wide, narrow], [1.0]).kept.tolist() == [[1, 2, 0], [1, -1, -1]]
    assert run([narrow, wide], [1.0]).kept.tolist() == [[1, -1, -1], [1, 2, 0]]


def test_the_same_tokens_have_the_same_score_bit_for_bit():
    rounded = plain([1.0, 1.0 + 1e-7], chunks=[(3,), (3,)])
    found = run([rounded], [1.0])
    assert found.scores[0] == found.scores[1]
    assert found.kept.tolist() == [[0, 1]]


def test_dedup_keeps_the_first_of_the_same_tokens():
    twins = plain([1.0, 2.0, 2.0], chunks=[(3,), (4,), (4,)], dedup=True)
    assert run([twins], [1.0]).kept.tolist() == [[1, 0]]


def test_the_same_chunk_after_other_tokens_is_no_duplicate():
    cousins = plain([1.0, 2.0], chunks=[(4,), (4,)], siblings=[0, 1], dedup=True)
    assert run([cousins], [1.0]).kept.tolist() == [[1, 0]]


def test_the_mean_ranks_but_the_sum_is_returned():
    long, short = (1, 1, 1), (2,)
    r = plain(
        [0.0, 0.0],
        chunks=[long, short],
        before=[1, 1],
        tuned=[[[2.0, 2.0, 2.0], [5.0]]],
        untuned=[[[0.0] * 3, [0.0]]],
        mean=True,
    )
    found = run([r], [1.0])
    assert found.kept.tolist() == [[1, 0]]  # 5 / 2 before 6 / 4
    assert found.scores.tolist() == [6.0, 5.0]


def test_a_broken_candidate_is_named_and_never_wins():
    found = run([plain([math.nan, 1.0, math.inf, -5.0])], [1.0])
    assert found.broken.tolist() == [0, -1, 2, -1]
    assert found.kept.tolist() == [[1, 3]]


def test_guides_are_added_with_their_weights():
    r = plain([0.0], tuned=[[[3.0]], [[1.0]]], untuned=[[[1.0]], [[0.5]]], width=1)
    assert run([r], [0.5, -2.0]).token_scores.tolist() == [0.5 * 2.0 - 2.0 * 0.5]


def test_no_rounding_at_large_scores():
    r = plain([0.1, 0.2], previous=[1e7, 1e7], width=1)
    found = run([r], [1.0])
    assert found.kept.tolist() == [[1]]
    assert torch.allclose(found.scores - 1e7, torch.tensor([0.1, 0.2]).double(), atol=1e-6)
