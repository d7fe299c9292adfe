"""The kernel of rms_norm computes what plain torch does, rounded at the same points."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.interpret.rule import DEVICE, DTYPES, compiled_for
from tests.support.drawn import drawn
from w2s_fast.kernels import rms_norm as module
from w2s_fast.kernels.rms_norm import rms_norm


@drawn(25)
@given(
    rows=st.integers(0, 40),
    width=compiled_for([1, 3, 16, 80, 1030], 80),
    offset=compiled_for([True, False], True, False),
    dtype=compiled_for(DTYPES, *DTYPES),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
    seed=st.integers(0, 2**16),
)
def test_every_row_is_normalised(
    rows: int, width: int, offset: bool, dtype: torch.dtype, scale: float, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    hidden = (scale * torch.randn(rows, width, generator=draw)).to(dtype)
    weight = torch.randn(width, generator=draw).to(dtype)
    expected = module._torch(hidden, weight, 1e-5, offset)
    found = rms_norm(hidden.to(DEVICE), weight.to(DEVICE), 1e-5, offset=offset).cpu()
    # A sum in another order may round the last bit differently.
    torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_heads_of_any_strides() -> None:
    hidden = torch.randn(3, 2, 5, 8).to(DEVICE).transpose(1, 2)
    weight = torch.randn(8).to(DEVICE)
    found = rms_norm(hidden, weight, 1e-6)
    torch.testing.assert_close(found, module._torch(hidden, weight, 1e-6, False))
    assert found.is_contiguous()


def test_the_operator_is_served_by_the_kernel() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_torch", None)
        rms_norm(torch.randn(2, 8).to(DEVICE), torch.randn(8).to(DEVICE), 1e-6)
