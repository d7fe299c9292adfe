"""sample_tokens gives a row its own token and log-prob, whatever stands in other rows."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.warps import (
    INF,
    Warp,
    any_row,
    any_warp,
    columns,
    draw,
    random_logits,
    rows_of,
    warped,
)
from tests.support.drawn import drawn
from tests.support.reference import sample_token
from w2s_fast.kernels import sample_tokens as sample_module
from w2s_fast.kernels import sample_tokens_triton
from w2s_fast.kernels.noise import uniform


def test_settings_of_one_row_do_not_reach_another() -> None:
    warps = [
        Warp(),
        Warp(temperature=0.0),
        Warp(top_k=3),
        Warp(top_p=0.5),
        Warp(min_p=0.2),
        Warp(temperature=0.7, top_k=12, top_p=0.9, min_p=0.01),
        Warp(top_k=1),
        Warp(temperature=2.0, top_k=40),
    ] * 50
    logits = rows_of(len(warps), 40)
    logits[::7, ::3] = -INF
    together, together_lp = draw(logits, warps, seed=3)
    for i, warp in enumerate(warps):
        token, lp = draw(logits[i : i + 1], warp, seed=3, position=[i])
        assert token.item() == together[i].item(), warp
        assert lp.item() == pytest.approx(together_lp[i].item(), abs=1e-6)
        assert warped(logits[i].numpy(), replace(warp, temperature=warp.temperature or 1.0))[
            token
        ] or (warp.temperature == 0)


def test_the_same_key_gives_the_same_token_in_every_row_and_batch() -> None:
    for vocabulary in (1, 7, 64, 1001):
        logits = torch.from_numpy(random_logits(vocabulary, vocabulary, 0.3))
        keys = [(seed, c, t) for seed in (0, 2**64 - 1) for c in (0, 3) for t in (0, 9)]

        def tokens(keys: list[tuple[int, int, int]], row: torch.Tensor = logits) -> list[int]:
            return draw(
                row.expand(len(keys), -1).contiguous(),
                Warp(temperature=0.9, top_k=500),
                seed=[k[0] for k in keys],
                candidate=[k[1] for k in keys],
                position=[k[2] for k in keys],
            )[0].tolist()

        alone = [tokens([key])[0] for key in keys]
        assert tokens(keys) == alone
        assert tokens(keys[::-1]) == alone[::-1]
        assert tokens(keys * 5) == alone * 5
        assert vocabulary < 64 or len(set(alone)) > 1  # different keys, different noise


def test_the_weights_of_a_row_are_the_same_bits_wherever_the_row_stands() -> None:
    # Else a token could depend on the batch. Vectorised exp must not differ at a block's end.
    from w2s_fast.kernels.sample_tokens import _weights

    for vocabulary in (5, 17, 1003):
        row = torch.from_numpy(random_logits(vocabulary, 1, 4.0))
        stack = row.expand(997, -1).contiguous()
        weights = _weights(stack, stack.max(-1).values, torch.full((997,), 0.7))
        alone = _weights(row[None], row.max()[None], torch.tensor([0.7]))
        assert torch.equal(weights, alone.expand(997, -1))


@pytest.mark.parametrize("others", [Warp(), Warp(top_k=5, top_p=0.5, min_p=0.3)], ids=str)
def test_temperature_0_takes_the_likeliest_token_the_lowest_id_at_a_tie(others: Warp) -> None:
    logits = rows_of(64, 33)
    logits[0] = torch.tensor([1.0, 5.0, 5.0] + [0.0] * 30)
    logits[1] = 0.0
    logits[2] = -INF
    logits[2, 11] = -50.0
    greedy = replace(others, temperature=0.0)
    for seed in (0, 1):
        tokens, logprobs = draw(logits, greedy, seed=seed)
        assert tokens.tolist() == logits.numpy().argmax(-1).tolist()
        assert tokens[:3].tolist() == [1, 0, 11]
        expected = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        torch.testing.assert_close(logprobs, expected)


def test_logprobs_are_those_of_temperature_1_before_any_warping() -> None:
    logits = rows_of(200, 50, 4.0)
    for warp in (Warp(), Warp(temperature=0.3, top_k=3, top_p=0.5, min_p=0.1), Warp(5.0)):
        tokens, logprobs = draw(logits, warp)
        assert logprobs.dtype == torch.float32
        expected = logits.double().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        torch.testing.assert_close(logprobs.double(), expected, atol=2e-6, rtol=1e-6)


def test_forbidden_tokens_are_never_sampled() -> None:
    logits = rows_of(3000, 30)
    forbidden = torch.rand(3000, 30) < 0.8
    forbidden[:, 13] = False
    logits[forbidden] = -INF
    for warp in (Warp(), Warp(temperature=50.0), Warp(top_k=29), Warp(top_p=0.999), Warp(0.0)):
        tokens, logprobs = draw(logits, warp)
        assert not forbidden[torch.arange(3000), tokens].any()
        assert logprobs.isfinite().all()


def test_broken_rows_are_flagged_by_nan_and_leave_their_neighbours_alone() -> None:
    clean = rows_of(9, 12)
    broken = clean.clone()
    broken[1, 4] = math.nan
    broken[3, 0] = INF
    broken[5] = -INF
    broken[7, :3] = torch.tensor([math.nan, INF, -INF])
    for warp in (Warp(), Warp(top_k=3, top_p=0.9, min_p=0.05), Warp(temperature=0.0)):
        tokens, logprobs = draw(broken, warp)
        expected, expected_lp = draw(clean, warp)
        assert logprobs.isnan().tolist() == [i in (1, 3, 5, 7) for i in range(9)]
        assert tokens[1::2].tolist() == [0] * 4
        assert tokens[::2].tolist() == expected[::2].tolist()
        torch.testing.assert_close(logprobs[::2], expected_lp[::2])


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e6, 1e30, 3e38])
def test_extreme_temperatures_stay_in_bounds(temperature: float) -> None:
    logits = rows_of(500, 12)
    logits[:, ::4] = -INF
    tokens, logprobs = draw(logits, Warp(temperature=temperature))
    assert logprobs.isfinite().all()
    if temperature < 1:
        assert tokens.tolist() == logits.numpy().argmax(-1).tolist()
    else:
        assert set(tokens.tolist()) == {i for i in range(12) if i % 4}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_logits_of_any_float_type_are_sampled_as_float32(dtype: torch.dtype) -> None:
    logits = rows_of(300, 100).to(dtype)
    warp = Warp(temperature=0.8, top_k=20, top_p=0.9)
    tokens, logprobs = draw(logits, warp)
    expected, expected_lp = draw(logits.float(), warp)
    assert torch.equal(tokens, expected)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, expected_lp)


def test_the_logits_given_are_not_changed() -> None:
    logits = rows_of(4, 20)
    before = logits.clone()
    draw(logits, Warp(temperature=0.7, top_k=5, top_p=0.8, min_p=0.1))
    assert torch.equal(logits, before)


@drawn(150)
@given(logits=any_row(30), warp=any_warp, seed=st.integers(0, 2**64 - 1))
def test_every_token_is_that_of_the_plain_reference(
    logits: list[float], warp: Warp, seed: int
) -> None:
    row = torch.tensor(logits, dtype=torch.float32)
    tokens, _ = draw(row.expand(40, -1), warp, seed=seed, candidate=[2] * 40)
    expected = [
        sample_token(row.numpy(), **asdict(warp), seed=seed, candidate=2, position=i)
        for i in range(40)
    ]
    assert tokens.tolist() == expected


def from_the_definition(logits: torch.Tensor, warps: list[Warp], seed: int) -> list[int]:
    """The whole-row path, which looks at every token."""
    rows = torch.arange(len(logits))
    u = uniform(torch.full_like(rows, seed), torch.zeros_like(rows), rows)
    largest = logits.max(-1).values
    return sample_module._draw(logits, largest, *columns(warps), u).tolist()


@pytest.mark.parametrize("kind", ["peaked", "flat", "tied", "mostly forbidden"])
def test_looking_at_the_largest_logits_alone_changes_no_token(kind: str) -> None:
    warps = [
        Warp(temperature, top_k, top_p, min_p)
        for temperature in (0.7, 3.0)
        for top_k in (0, 1, 7, 50, 500)
        for top_p in (1.0, 0.9, 0.2)
        for min_p in (0.0, 0.05)
    ]
    logits = rows_of(len(warps), 9000)
    if kind == "peaked":
        logits = logits * 4
    elif kind == "flat":
        logits = logits * 0.01
    elif kind == "tied":
        logits = logits.round()
    else:
        logits[torch.rand(logits.shape) < 0.999] = -INF
    for rows in (slice(None), slice(0, None, 3), slice(3, 4)):
        tokens, _ = draw(logits[rows], warps[rows], seed=2)
        assert tokens.tolist() == from_the_definition(logits[rows], warps[rows], seed=2)


def test_most_rows_with_filters_need_their_largest_logits_only() -> None:
    logits = rows_of(4, 9000, 4.0)
    with mock.patch.object(sample_module, "_draw", side_effect=AssertionError("the whole row")):
        draw(logits, [Warp(0.0), Warp(top_k=50), Warp(top_p=0.9), Warp(0.7, 50, 0.95, 0.1)])
        with pytest.raises(AssertionError, match="the whole row"):
            draw(logits, Warp())


@pytest.mark.parametrize("rows", [1, 2, 3, 16])
def test_all_that_a_launch_allocates_begins_where_vectors_may(rows: int) -> None:
    """Triton compiles a kernel anew where an address is no multiple of 16."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install 'w2s-fast[test]'")
    given: list[torch.Tensor] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **_: given.extend(x for x in args if isinstance(x, torch.Tensor))

    names = ("summarise", "block_weights", "draw", "search")
    with mock.patch.multiple(sample_tokens_triton, **{name: Kernel() for name in names}):
        keys = [torch.arange(rows)] * 3
        sample_tokens_triton.launch(rows_of(rows, 50_257), *columns([Warp()] * rows), *keys)
    assert len(given) > 4 * 3
    assert all(tensor.data_ptr() % 16 == 0 for tensor in given)
