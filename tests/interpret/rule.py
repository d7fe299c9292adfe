"""What a kernel is measured against, and on what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from w2s_fast.kernels.library import BACKEND

DEVICE = "cpu" if BACKEND == "interpret" else "cuda"
# bfloat16 is silently wrong in the interpreter.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
INTERPRETED = pytest.mark.skipif(DEVICE != "cpu", reason="only where kernels are interpreted")
_ALLOWANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}


T = TypeVar("T")


def compiled_for(values: Sequence[T], *on_device: T) -> st.SearchStrategy[Any]:
    """What a kernel is compiled for: any of these in the interpreter.

    On a GPU, where to compile takes a second or two, values for which it is compiled once.
    """
    return st.sampled_from(values if DEVICE == "cpu" else on_device)


def assert_as_exact_as_torch(got: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """A kernel may err by what plain torch errs at most, and the allowance of the inputs' dtype.

    The rule of cut cross-entropy's tests. Infinities and NaN must be where ``exact`` has them.
    """
    got, plain, exact = got.double().cpu(), plain.double().cpu(), exact.double().cpu()
    assert got.shape == exact.shape
    finite = exact.isfinite()
    assert torch.equal(got[~finite].nan_to_num(), exact[~finite].nan_to_num())
    assert torch.equal(got.isnan(), exact.isnan())
    error = (got - exact)[finite].abs()
    torch_error = (plain - exact)[finite].abs()
    if error.numel():
        assert error.max() <= torch_error.max() + _ALLOWANCE[dtype]


def exact_logprob(
    logits: Tensor, tokens: Tensor, vocab_size: int | None, scale: float, softcap: float | None
) -> Tensor:
    """The definition of both log-prob operators, in float64."""
    x = logits[:, :vocab_size].double() * scale
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    return x.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
