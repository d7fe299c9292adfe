"""Fused logits are the formula's, and the chosen beta is the best of its grid."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from w2s_fast.kernels.choose_beta import choose_beta
from w2s_fast.kernels.fuse_logits import fuse_logits

INF = math.inf


def a_round(
    rows: int, guides: int, vocabulary: int, scale: float = 2.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Base, tuned and untuned logits; the guides differ from row to row in how far they move."""
    base = torch.randn(rows, vocabulary) * scale
    untuned = base * 0.7 + torch.randn(guides, rows, vocabulary)
    moved = torch.linspace(0.1, 2.0, guides * rows).view(guides, rows, 1)
    return base, untuned + torch.randn_like(untuned) * moved, untuned


def objectives(base: Tensor, tuned: Tensor, untuned: Tensor) -> Tensor:
    """The definition in float64, from the divergences themselves. [S, G, 21]."""

    def divergence(p: Tensor, q: Tensor) -> Tensor:
        return (p.exp() * torch.where(p > -INF, p - q, 0.0)).sum(-1)

    base, tuned, untuned = base.double(), tuned.double(), untuned.double()
    p, q_tuned, q = (x.log_softmax(-1) for x in (base, tuned, untuned))
    d = torch.where(tuned.isneginf() & untuned.isneginf(), 0.0, tuned - untuned)
    out = []
    for i in range(21):
        moved = (base + i / 10 * d).log_softmax(-1)
        forward = divergence(moved, p) - divergence(q_tuned, q)
        backward = divergence(p.expand_as(moved), moved) - divergence(q, q_tuned)
        out.append(forward**2 + backward**2)
    return torch.stack(out, -1).transpose(0, 1)


def check_choice(
    base: Tensor,
    tuned: Tensor,
    untuned: Tensor,
    chosen: tuple[Tensor, Tensor, Tensor],
    error: float = 2e-5,
) -> None:
    """``error``: what float32 may lose of a divergence."""
    beta, active, objective = (x.cpu() for x in chosen)
    rows = torch.arange(len(base))
    assert beta.dtype == objective.dtype == torch.float32 and active.dtype == torch.int64
    assert beta.shape == tuned.shape[:2]
    step = (beta[active, rows] * 10).round().long()
    assert torch.equal(beta[active, rows], step / 10)
    rest = beta.clone()
    rest[active, rows] = 0
    assert not rest.any()

    exact = objectives(base, tuned, untuned)
    least = exact.flatten(1).min(-1).values
    at_choice = exact[rows, active, step]
    assert (at_choice.sqrt() <= least.sqrt() + error).all()
    assert ((objective.sqrt() - at_choice.sqrt()).abs() <= error).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("guides", [1, 3])
def test_fused_logits_are_the_formula(guides: int, dtype: torch.dtype) -> None:
    base, tuned, untuned = (x.to(dtype) for x in a_round(5, guides, 101))
    beta = torch.rand(guides, 5) * 2
    fused = fuse_logits(base, tuned, untuned, beta)
    assert fused.dtype == torch.float32
    difference = tuned.double() - untuned.double()
    exact = base.double() + (beta.double()[..., None] * difference).sum(0)
    torch.testing.assert_close(fused.double(), exact, atol=1e-5, rtol=1e-6)


def test_a_guide_of_weight_0_is_not_looked_at() -> None:
    base, tuned, untuned = a_round(3, 2, 20)
    alone = fuse_logits(base, tuned[:1], untuned[:1], torch.ones(1, 3))
    tuned[1], untuned[1, :, ::2] = math.nan, INF
    beta = torch.tensor([[1.0] * 3, [0.0] * 3])
    assert torch.equal(fuse_logits(base, tuned, untuned, beta), alone)


def test_forbidden_tokens_stay_forbidden_and_padding_of_the_guides_says_nothing() -> None:
    base, tuned, untuned = a_round(2, 1, 10)
    base[0, 3] = -INF
    tuned[..., 5] = untuned[..., 5] = -INF
    fused = fuse_logits(base, tuned, untuned, torch.ones(1, 2))
    assert fused[0, 3] == -INF
    assert torch.equal(fused[:, 5], base[:, 5])
    assert fused.isfinite().sum() == fused.numel() - 1


def test_what_is_broken_stays_visible() -> None:
    base, tuned, untuned = a_round(3, 1, 10)
    base[0, 2] = math.nan
    tuned[0, 1, 4] = math.nan
    fused = fuse_logits(base, tuned, untuned, torch.tensor([[1.0, 1.0, math.nan]]))
    assert fused[0].isnan().nonzero().tolist() == [[2]]
    assert fused[1].isnan().nonzero().tolist() == [[4]]
    assert fused[2].isnan().all()


@pytest.mark.parametrize("guides", [1, 3])
@pytest.mark.parametrize("scale", [0.5, 2.0, 6.0])
def test_beta_is_the_best_of_its_grid(guides: int, scale: float) -> None:
    given = a_round(12, guides, 301, scale)
    check_choice(*given, choose_beta(*given))


def test_a_guide_whose_untuned_model_is_the_base_gets_beta_1() -> None:
    base, tuned, _ = a_round(4, 1, 50)
    beta, active, objective = choose_beta(base, tuned, base[None])
    assert torch.equal(beta, torch.ones(1, 4))
    assert not active.any()
    assert (objective < 1e-9).all()


def test_a_guide_that_learnt_nothing_gets_beta_0() -> None:
    base, tuned, _ = a_round(4, 1, 50)
    beta, _, objective = choose_beta(base, tuned, tuned)
    assert not beta.any() and not objective.any()


def test_the_guide_that_fits_best_is_active_and_the_first_at_a_tie() -> None:
    base, tuned, untuned = a_round(2, 1, 50)
    perfect, other = base[None], untuned
    tuned = torch.cat([tuned, tuned, tuned])
    _, active, _ = choose_beta(base, tuned, torch.cat([other, perfect, perfect]))
    assert active.tolist() == [1, 1]


def test_every_row_is_judged_alone() -> None:
    given = a_round(6, 2, 80)
    together = choose_beta(*given)
    for row in range(6):
        alone = choose_beta(given[0][row : row + 1], *(x[:, row : row + 1] for x in given[1:]))
        assert torch.equal(alone[0][:, 0], together[0][:, row])
        assert alone[1][0] == together[1][row]


def test_forbidden_and_padded_tokens_leave_the_choice_alone() -> None:
    base, tuned, untuned = a_round(4, 2, 60)
    base[:, 7] = -INF
    tuned[..., 50:] = untuned[..., 50:] = -INF
    base[:, 50:] = -INF
    check_choice(base, tuned, untuned, choose_beta(base, tuned, untuned))


def test_broken_rows_get_nan_and_leave_their_neighbours_alone() -> None:
    clean = a_round(6, 2, 40)
    base, tuned, untuned = (x.clone() for x in clean)
    base[0, 3] = math.nan
    tuned[1, 1, 30] = INF
    base[2] = -INF
    untuned[0, 3, 0] = -INF  # infinitely far from a finite tuned logit
    beta, active, objective = choose_beta(base, tuned, untuned)
    expected = choose_beta(*clean)
    assert beta.isnan().all(0).tolist() == [True] * 4 + [False] * 2
    assert objective.isnan().tolist() == [True] * 4 + [False] * 2
    assert not active[:4].any()
    assert torch.equal(beta[:, 4:], expected[0][:, 4:])
    assert fuse_logits(base, tuned, untuned, beta)[:2].isnan().any(-1).all()
