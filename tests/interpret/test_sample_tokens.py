"""The kernels of sample_tokens draw the tokens of the definition, on whichever path a row goes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.interpret.rule import DEVICE, DTYPES, compiled_for
from tests.interpret.sampling import SMALL, check, kernel_weights, launch, tensors
from tests.kernels.warps import (
    INF,
    TIED,
    Warp,
    any_row,
    any_warp,
    chi_square_p,
    random_logits,
    rows_of,
    warped,
)
from tests.support.drawn import drawn
from w2s_fast.kernels import sample_tokens as torch_module
from w2s_fast.kernels import sample_tokens_triton as module
from w2s_fast.kernels.library import jit, tl
from w2s_fast.kernels.sample_tokens_search import cut_off, integer_weight
from w2s_fast.kernels.sample_tokens_triton import Tiling

EVERY_FILTER = [
    Warp(temperature, top_k, top_p, min_p)
    for temperature in (1.0, 0.6)
    for top_k in (0, 5)
    for top_p in (1.0, 0.8)
    for min_p in (0.0, 0.1)
]


@jit
def weigh_just_below_the_cut(largest, temperature, weights):
    row = tl.program_id(0)
    m, t = tl.load(largest + row), tl.load(temperature + row)
    below = cut_off(m, t) - tl.maximum(tl.abs(m), 28.0 * t) * 1.2e-7
    tl.store(weights + row, integer_weight(below, m, t))


def left_to_search(logits: Tensor, warps: Sequence[Warp], tiling: Tiling = SMALL) -> list[bool]:
    """Which rows the fast paths do not settle."""
    with mock.patch.object(module, "search", mock.MagicMock()):
        tokens, _ = launch(logits, warps, 0, tiling)
    return (tokens == -1).tolist()


@pytest.mark.parametrize("vocabulary", [1, 7, 64, 100, 129])
def test_every_combination_of_filters_in_one_call(vocabulary: int) -> None:
    warps = [*EVERY_FILTER, Warp(temperature=0.0), Warp(top_k=vocabulary)]
    check(rows_of(len(warps), vocabulary, 2.0), warps, seed=vocabulary)


def test_weights_are_those_of_the_exact_exponential_but_for_rounding() -> None:
    logits = rows_of(8, 200, 6.0)
    temperature = torch.tensor([1.0, 0.7, 0.1, 3.0, 1e-3, 50.0, 1.0, 0.3])
    exponent = (logits - logits.max(-1, keepdim=True).values).double()
    exponent /= temperature.double()[:, None]
    exact = exponent.exp() * 2**40
    # A float32 exponent is off by half an ulp, and exp itself by two.
    allowed = exact * (2.0**-22 + exponent.abs() * 2.0**-22) + 1
    assert ((kernel_weights(logits, temperature) - exact).abs() <= allowed).all()


def test_what_is_cut_off_weighs_nothing() -> None:
    largest, temperature = torch.meshgrid(
        torch.tensor([0.0, 1.0, -7.3, 500.0, 1e6, -1e30]),
        torch.tensor([1e-3, 0.05, 0.7, 1.0, 3.0, 1e4]),
        indexing="ij",
    )
    weights = torch.ones(36, dtype=torch.int64, device=DEVICE)
    on_device = (x.flatten().to(DEVICE) for x in (largest, temperature))
    weigh_just_below_the_cut[(36,)](*on_device, weights)
    assert not weights.any()


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-6, 1e6, 1e30, 3e38])
def test_extreme_temperatures_stay_in_bounds(temperature: float) -> None:
    logits = rows_of(4, 70, 2.0)
    logits[:, ::4] = -INF
    warps = [Warp(temperature), Warp(temperature, top_k=3), Warp(temperature, top_p=0.5)]
    check(logits, [*warps, Warp(temperature, min_p=0.5)])


def test_rows_go_by_the_path_that_is_meant_for_them() -> None:
    peaked = torch.from_numpy(-1.5 * np.log(np.random.default_rng(0).permutation(200) + 1.0))
    peaked = peaked.float().expand(9, -1).contiguous()
    flat = torch.zeros(9, 200)
    warps = [
        Warp(),
        Warp(temperature=0.0),
        Warp(min_p=0.05),
        Warp(top_k=1),
        Warp(top_k=5),
        Warp(top_k=5, top_p=0.7),
        Warp(top_p=0.3),
        Warp(top_p=0.999),  # its nucleus is more than the groups looked at
        Warp(top_k=60),  # more survivors than fit
    ]
    assert left_to_search(peaked, warps) == [False] * 7 + [True] * 2
    assert left_to_search(flat, warps) == [False] * 3 + [True] * 6  # ties overflow
    check(peaked, warps)
    check(flat, warps)


@pytest.mark.parametrize("distinct", [1, 2, 5])
def test_ties_are_kept_together_on_every_path(distinct: int) -> None:
    levels = torch.randint(distinct, (16, 150)).float() * 0.7
    warps = [*EVERY_FILTER]
    check(levels, warps)
    few = torch.full_like(levels, -3.0).scatter(1, torch.randint(150, (16, 9)), levels[:, :9])
    check(few, warps)
    assert not all(left_to_search(few, warps))


@pytest.mark.parametrize(
    "tiling", [SMALL, Tiling(64, 8, 8, 2, 1, 32, 2, 1)], ids=["fits", "search"]
)
def test_top_k_at_every_place_of_a_tie(tiling: Tiling) -> None:
    ks = range(1, len(TIED) + 2)
    check(torch.from_numpy(TIED).repeat(len(ks), 3), [Warp(top_k=k) for k in ks], tiling=tiling)


@pytest.mark.parametrize("tiling", [SMALL, Tiling(64, 8, 1, 1, 1, 32, 4)], ids=["fits", "search"])
def test_top_p_keeps_one_token_more_only_just_above_its_exact_edge(tiling: Tiling) -> None:
    row = torch.log(torch.tensor([5.0, 4.0, 3.0, 3.0, 2.0, 1.0]))
    weights = kernel_weights(row[None], torch.ones(1))[0].tolist()
    for kept in (1, 2, 4, 5):
        mass = sum(weights[:kept])
        edge = mass / sum(weights)
        while edge * sum(weights) > mass:
            edge = math.nextafter(edge, 0)
        warps = [Warp(top_p=p) for p in (edge, edge * (1 - 1e-9), edge + 1e-9) for _ in range(5)]
        check(row.expand(15, -1), warps, tiling=tiling)


def test_different_logits_of_equal_weight_are_a_tie() -> None:
    # So hot that exp(x / T) rounds to 1 for 40 different logits; only some are among the first
    # survivors, but top-p has to keep all of them.
    row = torch.full((200,), -5e8)
    row[torch.randperm(200)[:40]] = -torch.rand(40)
    row[50] = 0.0
    warps = [Warp(1e8, top_p=p) for p in (0.05, 0.1, 0.3)] * 2
    check(row.expand(6, -1), warps)
    assert len(set(kernel_weights(row[None], torch.tensor([1e8]))[0].tolist())) == 2


@pytest.mark.parametrize("margin", [1e-3, 1e-6, -1e-6, -1e-3])
def test_a_block_at_the_very_edge_of_min_p_is_read(margin: float) -> None:
    row = torch.full((128,), math.log(0.1) + margin)
    row[:64] = -9.0
    row[5] = 0.0
    tokens, _ = check(row.expand(10, -1), [Warp(min_p=0.1)] * 10)
    assert (tokens >= 64).any() == (margin > 0)


def test_zero_and_minus_zero_are_one_value() -> None:
    row = torch.tensor([0.0, -0.0, -1.0, -0.0, 0.0, -2.0] * 3)
    warps = [Warp(top_k=k) for k in range(1, 15)] + [Warp(top_p=0.5), Warp(temperature=0.0)]
    check(row.expand(16, -1), warps)
    check(-row.expand(16, -1), warps, tiling=Tiling(64, 8, 1, 1, 1, 32, 4))


def test_forbidden_tokens_are_never_drawn_and_never_counted() -> None:
    logits = rows_of(18, 100, 2.0)
    logits[torch.rand(18, 100) < 0.9] = -INF
    logits[:, 77] = -40.0
    logits[:3] = -INF
    logits[:3, 99] = 5.0
    check(logits, [*EVERY_FILTER, Warp(temperature=0.0), Warp(top_k=99)])


@pytest.mark.parametrize(
    "warp",
    [Warp(), Warp(temperature=0.0), Warp(top_k=3), Warp(top_p=0.9), Warp(min_p=0.1)],
    ids=str,
)
def test_broken_rows_are_flagged_by_nan_and_leave_their_neighbours_alone(warp: Warp) -> None:
    clean = rows_of(9, 70, 2.0)
    broken = clean.clone()
    broken[1, 66] = math.nan
    broken[3, 0] = INF
    broken[5] = -INF
    broken[7, :3] = torch.tensor([math.nan, INF, -INF])
    tokens, logprobs = launch(broken, [warp] * 9, 0)
    expected, expected_logprobs = launch(clean, [warp] * 9, 0)
    assert logprobs.isnan().tolist() == [i in (1, 3, 5, 7) for i in range(9)]
    assert tokens[1::2].tolist() == [0] * 4
    assert torch.equal(tokens[::2], expected[::2])
    assert torch.equal(logprobs[::2], expected_logprobs[::2])


@drawn(40)
@given(
    logits=any_row(90),
    warps=st.lists(any_warp, min_size=4, max_size=4),
    capacity=compiled_for([4, 32], 4),
    seed=st.integers(0, 2**63 - 1),
)
def test_any_row_with_any_settings(
    logits: list[float], warps: list[Warp], capacity: int, seed: int
) -> None:
    tiling = Tiling(32, 4, capacity, 2, 4, 32, 4)
    check(torch.tensor(logits).expand(4, -1), warps, seed, tiling)


@pytest.mark.parametrize("vocabulary", [900, 20_001, 70_000, 140_000])
def test_the_tiles_of_real_vocabularies_give_the_tokens_of_the_torch_path(vocabulary: int) -> None:
    rank = torch.from_numpy(np.random.default_rng(0).permutation(vocabulary) + 1.0)
    logits = torch.stack([-1.3 * rank.log(), torch.randn(vocabulary, dtype=torch.float64)]).float()
    warps = [Warp(), Warp(0.7, 50, 0.95), Warp(top_p=0.5), Warp(0.0)]
    logits = logits.repeat_interleave(len(warps), 0)
    tokens, logprobs = launch(logits, warps * 2, 5, None)
    expected, expected_logprobs = torch_module._torch(logits, *tensors(warps * 2, 5))
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logprobs, expected_logprobs, atol=3e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_be_slices_of_wider_ones_of_any_type(dtype: torch.dtype) -> None:
    wide = rows_of(16, 100, 2.0).to(dtype).to(DEVICE)
    wide[:, 90:] = 50.0  # padding: never drawn
    check(wide[:, :90], EVERY_FILTER)
    check(wide.t().contiguous().t()[:, :90], EVERY_FILTER)


def test_no_rows_give_no_tokens() -> None:
    tokens, logprobs = launch(torch.empty(0, 10), [], 0)
    assert tokens.shape == logprobs.shape == (0,)


def test_the_operator_is_served_by_the_kernels() -> None:
    logits, warps = rows_of(16, 100, 2.0), EVERY_FILTER
    on_device = [x.to(DEVICE) for x in tensors(warps, 0)]
    tokens, logprobs = torch_module.sample_tokens(logits.to(DEVICE), *on_device)
    expected, expected_logprobs = launch(logits, warps, 0, None)
    assert torch.equal(tokens.cpu(), expected)
    assert torch.equal(logprobs.cpu(), expected_logprobs)


@pytest.mark.parametrize("warp", [Warp(), Warp(top_k=4, top_p=0.9)], ids=str)
def test_tokens_follow_the_warped_distribution(warp: Warp) -> None:
    logits = random_logits(9, 3)
    rows = torch.from_numpy(logits).expand(250, -1)
    tokens, _ = launch(rows, [warp] * 250, 1, Tiling(16, 4, 16, 4, 4, 16, 4))
    observed = np.bincount(tokens.numpy(), minlength=9)
    p = warped(logits, warp)
    assert observed[p == 0].sum() == 0
    assert chi_square_p(observed, p) > 1e-3
    assert chi_square_p(observed, np.full(9, 1 / 9)) < 1e-6
