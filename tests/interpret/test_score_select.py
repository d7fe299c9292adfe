"""The kernels of score_select under Triton's interpreter: the operators apart, torch, the naive."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given

from tests.kernels.beams import DEVICE, RoundOfOne, run
from tests.kernels.score_rounds import (
    DrawnRound,
    Spare,
    assert_same_as_apart,
    call_of,
    check,
    check_from_hidden_states,
    drawn_rounds,
    same_bits,
    spares,
    vocabularies,
)
from tests.support.drawn import drawn
from w2s_fast.kernels import linear_logprob_partials, score_select
from w2s_fast.kernels.linear_logprob_partials import Partials
from w2s_fast.kernels.score_select import ScoreSelection
from w2s_fast.kernels.select_beams_triton import launch_options


def check_against_torch(
    rounds: list[DrawnRound], weights: list[float], spare: Spare | None = None
) -> None:
    call = call_of(rounds, weights, spare)
    found = call.run()
    with mock.patch.object(linear_logprob_partials, "runs_triton", return_value=False):
        plain = ScoreSelection.unpack(score_select._torch(*call.of_operator).cpu(), *call.size)
    candidates = sum(len(r.whole.chunks) for r in rounds)
    tokens = sum(len(chunk) for r in rounds for chunk in r.whole.chunks)
    for name in ("scores", "counts", "broken", "broken_base"):
        same_bits(getattr(found, name)[:candidates], getattr(plain, name)[:candidates])
    for name in ("tokens", "logprobs", "token_scores"):
        same_bits(getattr(found, name)[:tokens], getattr(plain, name)[:tokens])
    assert torch.equal(found.kept, plain.kept)
    assert torch.equal(found.parents, plain.parents)


@drawn(30)
@given(drawn_rounds(most=6, longest=6), spares)
def test_any_rounds_agree_with_the_operators_apart_and_with_the_naive_selection(drawn, spare):
    check(*drawn, spare)


@drawn(20)
@given(drawn_rounds(most=4, longest=18), spares)
def test_any_rounds_agree_with_torch_bit_for_bit(drawn, spare):
    check_against_torch(*drawn, spare)


@drawn(8)
@given(drawn_rounds(most=4, longest=6), spares, vocabularies())
def test_from_hidden_states_it_is_the_operators_one_after_the_other(drawn, spare, sizes):
    check_from_hidden_states(*drawn, spare, sizes)


@pytest.mark.parametrize("count", [17, 65, 129])
def test_more_candidates_than_a_tile_holds(count):
    chunks = [(c % 7, c % 3) for c in range(count)]
    scores = [[-0.1 * (c * 37 % 11), -0.7] for c in range(count)]
    whole = RoundOfOne(
        chunks=chunks,
        siblings=[c % 2 for c in range(count)],
        previous=[0.0] * count,
        before=[c % 2 for c in range(count)],
        parents=list(range(count)),
        tuned=[scores],
        untuned=[[[0.1] * 2 for _ in chunks]],
        width=count // 2,
        mean=count != 65,
        dedup=True,
    )
    options = launch_options(count, count // 2)
    assert options["OTHERS"] < count or count == 17
    check_against_torch([DrawnRound(whole, [4, 6], [[-1.0] * 2] * count)], [1.0])


def test_partials_of_several_blocks_are_merged_as_they_are_without_it() -> None:
    """300 splits in one model, 7 in the other."""
    r = RoundOfOne(
        chunks=[(3, 1, 4), (4, 1, 2)], siblings=[0, 0], previous=[0.1, 0.2], before=[1, 1],
        parents=[0, 0], tuned=[], untuned=[], width=1, mean=False, dedup=False,
    )  # fmt: skip
    draw = torch.Generator().manual_seed(1)
    tuned, untuned = (
        Partials(
            torch.randn(6, splits, generator=draw) * 8,
            torch.rand(6, splits, generator=draw) * 64 + 1,
            torch.randn(6, generator=draw),
        )
        for splits in (300, 7)
    )
    tuned, untuned = (Partials(*(x.to(DEVICE) for x in model)) for model in (tuned, untuned))
    drawn = [DrawnRound(r, [], [[-1.0] * 3] * 2)]
    apart = run([r], [0.3], logprobs=(tuned.logprobs()[None], untuned.logprobs()[None]))
    found = call_of(drawn, [0.3], guides=[(tuned, untuned)]).run()
    assert found.token_scores.isfinite().all()
    assert_same_as_apart(found, drawn, apart)
