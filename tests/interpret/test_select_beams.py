"""The kernel of select_beams under Triton's interpreter, against the naive selection."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from tests.kernels.beams import RoundOfOne, check, run, some_rounds
from tests.support.drawn import drawn
from w2s_fast.kernels.select_beams_triton import launch_options


@drawn(30)
@given(some_rounds(most=18, longest=18))
def test_any_round_agrees_with_the_naive_selection(drawn):
    check(*drawn)


@pytest.mark.parametrize("count", [17, 65, 129])
def test_more_candidates_than_a_tile_holds(count):
    chunks = [(c % 7, c % 3) for c in range(count)]
    scores = [[float(-(c * 37 % 11)), -1.0] for c in range(count)]
    r = RoundOfOne(
        chunks=chunks,
        siblings=[c % 2 for c in range(count)],
        previous=[0.0] * count,
        before=[0] * count,
        parents=list(range(count)),
        tuned=[scores],
        untuned=[[[0.0, 0.0] for _ in chunks]],
        width=count // 2,
        mean=False,
        dedup=True,
    )
    options = launch_options(count, count // 2)
    assert options["OTHERS"] < count or count == 17
    check([r], [1.0])


def test_bounds_that_lie_above_change_no_bit():
    """Larger tiles of candidates are narrower: sums must not be cut where they are."""
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3, 21, generator=draw).tolist()
    r = RoundOfOne(
        chunks=[(c,) * 21 for c in range(3)],
        siblings=[0, 0, 0],
        previous=[0.1, 0.2, 0.3],
        before=[1, 1, 1],
        parents=[0, 1, 2],
        tuned=[scores[0]],
        untuned=[scores[1]],
        width=2,
        mean=False,
        dedup=True,
    )
    assert launch_options(3, 2)["TOKENS"] > launch_options(203, 2)["TOKENS"]
    exact, above = run([r], [0.3]), run([r], [0.3], above=(200, 3))
    assert torch.equal(above.scores, exact.scores)
    assert torch.equal(above.token_scores, exact.token_scores)
    assert above.kept.tolist() == [exact.kept[0].tolist() + [-1] * 3]
    assert above.parents.tolist() == [exact.parents[0].tolist() + [-1] * 3]
