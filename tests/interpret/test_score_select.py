"""The kernels of score_select under Triton's interpreter: the operators apart, torch, the naive."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from tests.kernels.beams import RoundOfOne
from tests.kernels.score_rounds import (
    DrawnRound,
    Spare,
    call_of,
    check,
    check_from_hidden_states,
    drawn_rounds,
    same_bits,
    spares,
    vocabularies,
)
from w2s_fast.kernels import score_select as module
from w2s_fast.kernels.score_select import ScoreSelection
from w2s_fast.kernels.select_beams_triton import launch_options


def check_against_torch(
    rounds: list[DrawnRound], weights: list[float], spare: Spare | None = None
) -> None:
    call = call_of(rounds, weights, spare)
    found = call.run()
    plain = ScoreSelection.unpack(module._torch(*call.of_operator).cpu(), *call.size)
    candidates = sum(len(r.whole.chunks) for r in rounds)
    tokens = sum(len(chunk) for r in rounds for chunk in r.whole.chunks)
    for name in ("scores", "counts", "broken", "broken_base"):
        same_bits(getattr(found, name)[:candidates], getattr(plain, name)[:candidates])
    for name in ("tokens", "logprobs", "token_scores"):
        same_bits(getattr(found, name)[:tokens], getattr(plain, name)[:tokens])
    assert torch.equal(found.kept, plain.kept)
    assert torch.equal(found.parents, plain.parents)


@settings(max_examples=50)
@given(drawn_rounds(most=18, longest=18), spares)
def test_any_rounds_agree_with_the_naive_selection_with_the_operators_apart_and_with_torch(
    drawn, spare
):
    check(*drawn, spare)
    check_against_torch(*drawn, spare)


@settings(max_examples=15)
@given(drawn_rounds(most=6, longest=6), spares, vocabularies())
def test_from_hidden_states_it_is_the_operators_one_after_the_other(drawn, spare, sizes):
    check_from_hidden_states(*drawn, spare, sizes)


@pytest.mark.parametrize("count", [17, 65, 129])
def test_more_candidates_than_a_tile_holds(count):
    chunks = [(c % 7, c % 3, c % 5, c % 2) for c in range(count)]
    scores = [[-0.1 * (c * 37 % 11), -1.0, 0.3, -0.7] for c in range(count)]
    whole = RoundOfOne(
        chunks=chunks,
        siblings=[c % 2 for c in range(count)],
        previous=[0.0] * count,
        before=[0] * count,
        parents=list(range(count)),
        tuned=[scores],
        untuned=[[[0.1] * 4 for _ in chunks]],
        width=count // 2,
        mean=False,
        dedup=True,
    )
    options = launch_options(count, count // 2)
    assert options["OTHERS"] < count or count == 17
    rounds = [DrawnRound(whole, [4, 6], [[-1.0] * 4] * count)]
    check(rounds, [1.0])
    check_against_torch(rounds, [1.0])


def test_partials_of_more_than_one_block_are_merged_as_linear_logprob_does() -> None:
    """300 splits of 64 ids."""
    chunk = RoundOfOne(
        chunks=[(3, 1), (4, 1)], siblings=[0, 0], previous=[0.0, 0.0], before=[1, 1],
        parents=[0, 0], tuned=[[[0.0, 0.0]] * 2], untuned=[[[0.0, 0.0]] * 2], width=1, mean=False,
        dedup=False,
    )  # fmt: skip
    rounds = [DrawnRound(chunk, [], [[-1.0, -1.0]] * 2)]
    check_from_hidden_states(rounds, [1.0], Spare(), [19_200], vocab_size=19_200)
