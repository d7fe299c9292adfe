"""The kernel of rotate gives the bits that plain torch gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.interpret.rule import DEVICE, DTYPES, compiled_for
from tests.kernels.test_rotate import drawn_heads
from tests.support.drawn import drawn
from w2s_fast.kernels import rotate as module
from w2s_fast.kernels.rotate import rotate


@drawn(25)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(0, 5),
    heads=compiled_for([(1, 1), (4, 2), (3, 3), (9, 1)], (4, 2)),
    dim=compiled_for([2, 16, 80], 80),
    one=st.booleans(),
    dtype=compiled_for(DTYPES, *DTYPES),
    seed=st.integers(0, 2**16),
)
def test_every_head_is_turned(
    batch: int,
    tokens: int,
    heads: tuple[int, int],
    dim: int,
    one: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    given = drawn_heads(batch, *heads, tokens, dim, dtype, one)
    found = rotate(*(x.to(DEVICE) for x in given))
    for got, expected, x in zip(found, module._torch(*given), given):
        # A GPU may fuse a product and a sum in float32; half types are rounded in between.
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-6 if dtype == torch.float32 else 0,
                                   atol=1e-6 if dtype == torch.float32 else 0)  # fmt: skip
        assert got.stride() == x.stride()


def test_many_heads_take_several_programs_and_strides_are_any() -> None:
    q, k = torch.randn(2, 40, 3, 64, 2)[..., 0], torch.randn(2, 33, 3, 64)
    cos, sin = torch.randn(2, 64, 3).mT, torch.randn(2, 3, 128)[..., ::2]
    given = [x.to(DEVICE) for x in (q, k, cos, sin)]
    for got, expected in zip(rotate(*given), module._torch(*given)):
        torch.testing.assert_close(got, expected)


def test_the_operator_is_served_by_the_kernel() -> None:
    given = drawn_heads(1, 2, 2, 3, 8, torch.float32, True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_torch", None)
        rotate(*(x.to(DEVICE) for x in given))
