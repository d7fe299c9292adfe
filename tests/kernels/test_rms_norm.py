"""rms_norm computes what the modules of transformers do."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from w2s_fast.kernels.rms_norm import rms_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7,), (1, 5, 7), (2, 0, 7), (2, 3, 4, 16)])
def test_it_is_what_the_modules_compute(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (3 * torch.randn(shape)).to(dtype)
    plain, offset = LlamaRMSNorm(shape[-1], 1e-5), Gemma2RMSNorm(shape[-1], 1e-5)
    for module in (plain, offset):
        module.weight.data.normal_()
        module.to(dtype)
    assert torch.equal(rms_norm(x, plain.weight.detach(), 1e-5), plain(x).detach())
    found = rms_norm(x, offset.weight.detach(), 1e-5, offset=True)
    assert found.dtype == dtype and torch.equal(found, offset(x).detach())


def test_any_strides_and_float64() -> None:
    x = torch.randn(6, 4, dtype=torch.float64).T
    w = torch.rand(6, dtype=torch.float64)
    out = rms_norm(x, w, 0.0)
    torch.testing.assert_close(out, x / x.square().mean(1, keepdim=True).sqrt() * w)
    assert out.is_contiguous()


@pytest.mark.parametrize(
    ("hidden", "weight", "message"),
    [
        (
            torch.zeros(3, 4),
            torch.zeros(3),
            r"weight \(3,\) must have the width of hidden \(3, 4\)",
        ),
        (torch.tensor(1.0), torch.zeros(1), "must have the width"),
        (
            torch.zeros(3, 4),
            torch.zeros(4).half(),
            "hidden is torch.float32 and weight torch.float16",
        ),
    ],
)
def test_bad_input_is_named(hidden: torch.Tensor, weight: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rms_norm(hidden, weight, 1e-6)
