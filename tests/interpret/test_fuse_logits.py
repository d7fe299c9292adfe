"""The kernels of fuse_logits and choose_beta against float64 and against plain torch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.interpret.rule import DEVICE, DTYPES, assert_as_exact_as_torch
from tests.kernels.test_fuse_logits import a_round, check_choice
from w2s_fast.kernels import choose_beta as choosing
from w2s_fast.kernels import fuse_logits as fusing
from w2s_fast.kernels.choose_beta import choose_beta
from w2s_fast.kernels.fuse_logits import fuse_logits

INF = math.inf


def fused(base: Tensor, tuned: Tensor, untuned: Tensor, beta: Tensor, block: int = 32) -> Tensor:
    given = (x.to(DEVICE) for x in (base, tuned, untuned, beta))
    return fusing._triton(*given, block=block).cpu()


def chosen(
    base: Tensor, tuned: Tensor, untuned: Tensor, chunk: int = 64, block: int = 16
) -> tuple[Tensor, ...]:
    given = (x.to(DEVICE) for x in (base, tuned, untuned))
    return tuple(x.cpu() for x in choosing._triton(*given, chunk=chunk, block=block))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 32, 101])
@pytest.mark.parametrize("guides", [1, 3])
def test_fused_logits_err_no_more_than_torch(
    guides: int, vocabulary: int, dtype: torch.dtype
) -> None:
    base, tuned, untuned = (x.to(dtype) for x in a_round(5, guides, vocabulary))
    beta = torch.rand(guides, 5) * 2
    beta[0, 1] = 0
    difference = tuned.double() - untuned.double()
    exact = base.double() + (beta.double()[..., None] * difference).sum(0)
    plain = fusing._torch(base, tuned, untuned, beta)
    got = fused(base, tuned, untuned, beta)
    assert got.dtype == torch.float32
    assert_as_exact_as_torch(got, plain, exact, dtype)


def test_special_values_are_those_of_torch() -> None:
    base, tuned, untuned = a_round(6, 2, 70)
    base[0, 3] = -INF
    tuned[:, 1, 5] = untuned[:, 1, 5] = -INF
    base[2, 2] = math.nan
    tuned[1, 3, 4] = math.nan
    tuned[0, 4, 1] = -INF
    beta = torch.ones(2, 6)
    beta[0] = 0.0
    beta[1, 5] = math.nan
    expected = fusing._torch(base, tuned, untuned, beta)
    torch.testing.assert_close(fused(base, tuned, untuned, beta), expected, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("guides", [1, 3])
def test_beta_is_the_best_of_its_grid(guides: int, dtype: torch.dtype) -> None:
    given = tuple(x.to(dtype) for x in a_round(6, guides, 210))
    check_choice(*given, chosen(*given))


@pytest.mark.parametrize(("chunk", "block"), [(16, 16), (32, 32), (128, 32), (256, 128)])
@pytest.mark.parametrize("vocabulary", [1, 31, 97])
def test_the_choice_does_not_depend_on_how_the_vocabulary_is_cut(
    vocabulary: int, chunk: int, block: int
) -> None:
    given = a_round(3, 1, vocabulary)
    check_choice(*given, chosen(*given, chunk, block))


def test_large_logits_and_far_apart_maxima_do_not_overflow() -> None:
    base, tuned, untuned = a_round(4, 1, 100, 3.0)
    base[1] += 3e4
    tuned[0, 2] += 5e3
    untuned[0, 2] += 5e3
    tuned[0, 3, 7] += 300.0  # the maximum moves with beta, by 600
    given = (base, tuned, untuned)
    # Float32 itself loses this much of logits as large.
    check_choice(*(x[..., :1, :] for x in given), chosen(*(x[..., :1, :] for x in given)))
    check_choice(*(x[..., 1:3, :] for x in given), chosen(*(x[..., 1:3, :] for x in given)), 2e-2)
    check_choice(*(x[..., 3:, :] for x in given), chosen(*(x[..., 3:, :] for x in given)), 1e-3)


def test_ties_forbidden_padded_and_broken_rows_are_treated_as_torch_does() -> None:
    base, tuned, untuned = a_round(9, 2, 100)
    base[:, 7] = -INF
    tuned[..., 90:] = untuned[..., 90:] = -INF
    base[0, 3] = math.nan
    tuned[1, 1, 30] = INF
    base[2] = -INF
    untuned[0, 3, 0] = -INF
    tuned[1, 4] = tuned[0, 4]
    untuned[1, 4] = untuned[0, 4]  # the guides tie
    tuned[:, 5] = untuned[:, 5]  # every beta ties
    base[6, 90:] = -INF
    untuned[1, 6] = base[6]  # a perfect guide, where both allow the same tokens
    tuned[1, 6, 7] = -INF
    beta, active, objective = chosen(base, tuned, untuned)
    expected = choosing._torch(base, tuned, untuned)
    assert torch.equal(beta.nan_to_num(-1), expected[0].nan_to_num(-1))
    assert torch.equal(active, expected[1])
    torch.testing.assert_close(objective, expected[2], atol=1e-6, rtol=1e-3, equal_nan=True)
    assert beta.isnan().all(0).tolist() == [True] * 4 + [False] * 5
    assert active[4] == 0 and beta[:, 5].tolist() == [0, 0] and active[6] == 1


def test_rows_may_be_slices_of_wider_ones() -> None:
    wide = a_round(4, 2, 120)
    given = tuple(x[..., :100] for x in wide)
    beta = torch.rand(4, 2).t()
    whole = tuple(x.contiguous() for x in given)
    assert torch.equal(fused(*given, beta), fused(*whole, beta.contiguous()))
    for sliced, copied in zip(chosen(*given), chosen(*whole)):
        assert torch.equal(sliced, copied)
    transposed = tuple(x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in given)
    assert torch.equal(fused(*transposed, beta), fused(*whole, beta))


def test_no_rows_give_nothing() -> None:
    base, guides = torch.empty(0, 9), torch.empty(2, 0, 9)
    assert fused(base, guides, guides, torch.empty(2, 0)).shape == (0, 9)
    beta, active, objective = chosen(base, guides, guides)
    assert beta.shape == (2, 0) and active.shape == objective.shape == (0,)


def test_the_operators_are_served_by_the_kernels() -> None:
    given = a_round(2, 1, 50)
    on_device = tuple(x.to(DEVICE) for x in given)
    beta, _, objective = choose_beta(*on_device)
    kernel_beta, _, kernel_objective = choosing._triton(*on_device)
    assert torch.equal(beta, kernel_beta) and torch.equal(objective, kernel_objective)
    assert torch.equal(fuse_logits(*on_device, beta), fusing._triton(*on_device, kernel_beta))
