"""The kernel of select_beams under Triton's interpreter, against the naive selection."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from tests.kernels.beams import RoundOfOne, check, some_rounds
from w2s_fast.kernels.select_beams_triton import launch_options


@settings(max_examples=60)
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
