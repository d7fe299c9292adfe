"""score_select against the operators it stands for, and against the selection written naively."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.beams import RoundOfOne, run
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
from tests.support.drawn import drawn
from w2s_fast.kernels import score_select as module
from w2s_fast.kernels.linear_logprob_partials import Partials
from w2s_fast.kernels.score_select import ScoreSelection, score_select

END = 9


def plain(chunks: list[tuple[int, ...]], **changes: object) -> DrawnRound:
    """Candidates of these chunks, in which each token is worth its id; 9 ends a response."""
    count = len(chunks)
    fields: dict[str, object] = {
        "chunks": chunks,
        "siblings": [0] * count,
        "previous": [0.0] * count,
        "before": [1] * count,
        "parents": [10 + c for c in range(count)],
        "tuned": [[[float(t) for t in chunk] for chunk in chunks]],
        "untuned": [[[0.0] * len(chunk) for chunk in chunks]],
        "width": 2,
        "mean": False,
        "dedup": False,
    }
    own = {"stops": [END], "base": [[-1.0] * len(chunk) for chunk in chunks]}
    for name in own.keys() & changes.keys():
        own[name] = changes.pop(name)  # type: ignore[assignment]
    return DrawnRound(RoundOfOne(**{**fields, **changes}), **own)  # type: ignore[arg-type]


def select(*rounds: DrawnRound, weights: tuple[float, ...] = (1.0,)) -> ScoreSelection:
    return call_of(list(rounds), list(weights)).run()


@drawn(40)
@given(drawn_rounds(), spares)
def test_any_rounds_agree_with_the_naive_selection_and_with_the_operators_apart(drawn, spare):
    check(*drawn, spare)


@drawn(15)
@given(drawn_rounds(), spares, vocabularies())
def test_from_hidden_states_it_is_the_operators_one_after_the_other(drawn, spare, sizes):
    check_from_hidden_states(*drawn, spare, sizes)


def test_a_chunk_ends_with_its_first_stop():
    found = select(plain([(1, END, 5, END, 5), (2, 3, 4, 5, 6), (END, 1, 1, 1, 1)]))
    assert found.counts.tolist() == [2, 5, 1]
    assert found.scores.tolist() == [10.0, 20.0, 9.0]
    assert found.token_scores.tolist() == [1, 9, 0, 0, 0, 2, 3, 4, 5, 6, 9, 0, 0, 0, 0]
    assert found.tokens.tolist() == [1, END, 5, END, 5, 2, 3, 4, 5, 6, END, 1, 1, 1, 1]
    assert found.kept.tolist() == [[1, 0]]
    assert found.parents.tolist() == [[11, 10]]


def test_every_round_has_its_own_stops():
    chunk = (1, 2, 3)
    found = select(
        plain([chunk], stops=[]), plain([chunk], stops=[1, 3]), plain([chunk], stops=[2])
    )
    assert found.counts.tolist() == [3, 1, 2]


def test_twins_may_differ_behind_their_end():
    twins = plain([(3,), (1, END, 4), (1, END, 5), (1, END)], dedup=True, width=4)
    found = select(twins)
    assert found.kept.tolist() == [[1, 0, -1, -1]]
    again = replace(twins, whole=replace(twins.whole, dedup=False))
    again.whole.tuned[0][2][0] += 2e-7  # they ran in other rows, with another rounding
    assert select(again).scores.tolist() == [3.0, 10.0, 10.0, 10.0]


def test_a_candidate_that_ends_here_is_no_twin_of_one_that_goes_on():
    found = select(plain([(1, END, 2), (1, END, 2)], dedup=True), plain([(1, 2), (1, END)]))
    assert found.kept.tolist() == [[0, -1], [1, 0]]


def test_the_mean_is_over_the_tokens_up_to_the_end():
    long = plain([(4, 4, 4), (1, END, 7)], mean=True, before=[0, 0])
    assert select(long).kept.tolist() == [[1, 0]]  # 10 / 2 before 12 / 3
    assert select(long).scores.tolist() == [12.0, 10.0]


def test_a_held_hypothesis_has_no_tokens_and_keeps_its_score():
    found = select(plain([(), (1, 2)], previous=[9.0, 0.0]))
    assert found.counts.tolist() == [0, 2]
    assert found.scores.tolist() == [9.0, 3.0]
    assert found.kept.tolist() == [[0, 1]]


def test_what_is_broken_is_named_up_to_the_end_and_not_behind_it():
    chunks = [(1, 2, END, 3), (1, END, 3, 3)]
    tuned = [[[1.0, math.nan, math.inf, 0.0], [1.0, 9.0, math.nan, math.nan]]]
    base = [[-1.0, -1.0, math.nan, 0.0], [-1.0, -1.0, -math.inf, 0.0]]
    found = select(plain(chunks, tuned=tuned, base=base))
    assert found.broken.tolist() == [1, -1]
    assert found.broken_base.tolist() == [2, -1]
    assert found.kept.tolist() == [[1, 0]]
    assert select(plain(chunks, base=[base[1], [*base[1][1:], 0.0]])).broken_base.tolist() == [2, 5]


def test_spare_rounds_candidates_and_tokens_change_nothing():
    rounds = [plain([(1, END, 2), (3, 4, 5)]), plain([(), (7, 1, 1)], mean=True)]
    call = call_of(rounds, [1.0], Spare(3, 4, 5, 2, 60, 3))
    found, alone = call.run(), select(*rounds)
    assert found.kept.tolist() == [row + [-1] * 3 for row in alone.kept.tolist()] + [[-1] * 5] * 3
    assert found.scores[:4].tolist() == alone.scores.tolist()
    assert found.counts[:4].tolist() == alone.counts.tolist()


def test_one_buffer_holds_it_all_in_the_order_of_the_fields():
    call = call_of([plain([(1, END, 2), (3, 4, 5)]), plain([(7,)])], [1.0])
    packed = score_select(*call.arguments).cpu()
    found = ScoreSelection.unpack(packed, *call.size)
    assert packed.dtype == torch.int64 and packed.is_contiguous()
    assert packed.numel() == 2 * 2 * 2 + 4 * 3 + 3 * 7
    words = torch.cat([field.flatten().view(torch.int64) for field in found])
    assert torch.equal(words, packed)
    assert all(field.data_ptr() >= packed.data_ptr() for field in found)  # views, no copies


def test_more_candidates_than_a_program_takes_go_to_torch(monkeypatch: pytest.MonkeyPatch):
    rounds = [plain([(c % 7, c % 3, END, c) for c in range(40)], width=9)]
    call = call_of(rounds, [0.5])
    found = call.run()
    monkeypatch.setattr(module, "MAX_CANDIDATES", 39)
    packed = module._triton(*call.of_operator)
    for ours, theirs in zip(ScoreSelection.unpack(packed.cpu(), *call.size), found):
        assert torch.equal(ours, theirs)


@given(st.integers(0, 50), st.integers(1, 5), st.booleans())
def test_splits_merge_to_the_log_prob(seed: int, splits: int, broken: bool) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, splits, 30, generator=draw) * 8
    token = torch.randint(splits * 30, (6,), generator=draw)
    if broken:
        logits[2, splits - 1, 3] = math.nan
    largest = logits.nan_to_num().amax(2)
    total = (logits - largest[..., None]).exp().sum(2)
    flat = logits.flatten(1)
    found = Partials(largest, total, flat.gather(1, token[:, None])[:, 0]).logprobs()
    exact = flat.double().log_softmax(1).gather(1, token[:, None])[:, 0]
    torch.testing.assert_close(found.double(), exact, equal_nan=True, atol=2e-5, rtol=1e-5)


def test_finished_log_probs_are_the_same_bits() -> None:
    values = torch.cat([-torch.rand(500) * 90, torch.tensor([math.nan, -math.inf, -0.0, 1e-30])])
    found = Partials.of_logprobs(values).logprobs()
    same_bits(found.double(), values.double())


@pytest.mark.parametrize("wrong", ["weights", "no guide", "partials", "logprobs"])
def test_arguments_that_do_not_fit_are_refused(wrong: str) -> None:
    guides, weights, tokens, logprobs, *rest = call_of([plain([(1, 2)])], [1.0]).arguments
    if wrong == "weights":
        weights = torch.ones(2, dtype=torch.float64)
    elif wrong == "no guide":
        guides, weights = [], weights[:0]
    elif wrong == "partials":
        guides = [(guides[0][0], Partials.of_logprobs(torch.zeros(3)))]
    else:
        logprobs = logprobs[:1]
    with pytest.raises(ValueError, match=r"must be|two for each"):
        score_select(guides, weights, tokens, logprobs, *rest)


def test_the_naive_rounds_are_cut_where_they_should() -> None:
    """The reference itself."""
    r = plain([(1, END, 2), (3, 4)])
    assert r.cut().chunks == [(1, END), (3, 4)]
    assert run([r.cut()], [1.0]).scores.tolist() == [10.0, 7.0]


def test_where_all_is_spare_nothing_is_kept() -> None:
    """As it is when a recording is made of it."""
    spare = Partials.of_logprobs(torch.zeros(3))
    int64, flags = torch.zeros(2, dtype=torch.int64), torch.zeros(1, dtype=torch.bool)
    packed = score_select(
        [(spare, spare)], torch.ones(1, dtype=torch.float64), torch.zeros(3, dtype=torch.int64),
        torch.zeros(3), torch.zeros(3, dtype=torch.int64), int64.double(), int64, int64.int(),
        int64, int64, int64, int64, int64[:1], flags, flags, 2, 2,
    )  # fmt: skip
    found = ScoreSelection.unpack(packed, 1, 2, 3, 2)
    assert found.kept.tolist() == found.parents.tolist() == [[-1, -1]]
