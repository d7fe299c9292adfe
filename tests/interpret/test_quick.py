"""The quick interpreter gives the bits of the one that Triton has, and sees integers overflow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.interpret.quick import as_it_is
from tests.interpret.sampling import launch
from tests.kernels.test_paged_attention import MIXED, make_case
from tests.kernels.warps import Warp, rows_of
from w2s_fast.kernels.library import BACKEND, jit, tl
from w2s_fast.kernels.paged_attention import paged_attention

pytestmark = pytest.mark.skipif(BACKEND != "interpret", reason="there is no interpreter")


@jit
def twice(x):
    return x + x


@jit
def operations(floats, whole, out, N: tl.constexpr):
    """Numbers and tensors of all types beside each other; a row of 64 bits for each result."""
    i = tl.arange(0, N)
    x, n = tl.load(floats + i), tl.load(whole + i)
    small, big = n.to(tl.int8), n.to(tl.uint32)
    first, half = tl.load(floats), x.to(tl.float16)
    grid = x[:, None] * n[None, :] + first
    for result in (
        x * 0.0, x * -0.0, 0.0 - x, -0.0 - x, x / 3, 3 / x, x + 1, 1 + n, n + 1.5, n / 2,
        n // 3, n % 3, -n // 3, -n % 3, n == 0, n == 0.0, n > False, n > 2, x != x, small - 7,
        small * 3, big - big, big >> 1, n >> 1, n << 2, n ^ 21, ~n, -x, half / 3, half * 3,
        half + x, first + n, twice(n), twice(half), tl.where(n > 2, x, 0), tl.where(x > 0, 1.0, n),
        tl.maximum(x, 0), tl.minimum(n, 2), tl.abs(x), tl.exp(half.to(tl.float32)), tl.cumsum(n, 0),
        tl.sum(grid, 1), tl.max(grid, 0), tl.min(grid.to(tl.float64), 1), (n > 1) & (x > 0),
        x.to(tl.int32, bitcast=True) * tl.full((), 1, tl.int64), tl.full((N,), 3, tl.float16) + i,
    ):  # fmt: skip
        tl.store(out + i, result.to(tl.float64).to(tl.int64, bitcast=True))
        out += N


@jit
def overflow(numbers, out, OPERATION: tl.constexpr):
    x = tl.load(numbers)
    y = tl.load(numbers + 1)
    if OPERATION == "add":
        tl.store(out, x + y)
    elif OPERATION == "sub":
        tl.store(out, -x - y)
    else:
        tl.store(out, x * y)


def computed() -> list[Tensor]:
    floats = torch.tensor([0.5, -0.0, 1e-3, -7.25, float("inf"), float("nan"), 3.0, -1e3])
    whole = torch.tensor([3, 0, -5, 1, 2, 40, -40, 7], dtype=torch.int32)
    out = torch.zeros(47, 8, dtype=torch.int64)
    operations[(1,)](floats, whole, out, N=8)
    return [out]


def sampled() -> list[Tensor]:
    warps = [Warp(), Warp(0.0), Warp(0.7, 5), Warp(top_p=0.8), Warp(2.0, 9, 0.5, 0.1)]
    return list(launch(rows_of(5, 100, 2.0), warps, 3))


def attended() -> list[Tensor]:
    case = make_case(MIXED)
    return [paged_attention(*case.tensors(), scale=0.25, window=9, softcap=3.0, **case.bounds())]


@pytest.mark.parametrize("results", [computed, sampled, attended])
def test_results_have_the_same_bits(results: Any) -> None:
    quick = results()
    with as_it_is():
        plain = results()
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(quick, plain))


@pytest.mark.parametrize("operation", ["add", "sub", "mul"])
@pytest.mark.parametrize(("dtype", "most"), [(torch.int32, 2**31 - 1), (torch.int16, 2**15 - 1)])
def test_overflow_is_an_error(dtype: torch.dtype, most: int, operation: str) -> None:
    out = torch.zeros(1, dtype=dtype)
    overflow[(1,)](torch.tensor([most - 1, 1], dtype=dtype), out, OPERATION=operation)
    assert out.item() == {"add": most, "sub": -most, "mul": most - 1}[operation]
    with pytest.raises(Exception, match="overflows"):
        overflow[(1,)](torch.tensor([most - 1, 3], dtype=dtype), out, OPERATION=operation)
