"""Forwards of some modules by faster operators, which compute the same.

On a CPU torch leaves products in float32 to its BLAS, which takes up to three times as long as
oneDNN to multiply a few rows with large weights: see ``pytest bench/ -k product``. GPT-2's GELU is
eight operators in transformers, of which torch has one. What Triton kernels compute: fused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from w2s_fast.models.fused import fused_forward

Forward = Callable[[Any, Tensor], Tensor]

# Below, what oneDNN does once a call takes longer than the product.
_LEAST_WEIGHTS = 1 << 19
# Above, weights are read once for many rows by either, and torch's BLAS is the faster one for those
# that lie as GPT-2's do.
_MOST_ROWS = 32


def forward_of(module: nn.Module) -> Callable[..., Any] | None:
    """What a twin of this module is to be run by; None: its class's own forward."""
    if type(module) is NewGELUActivation:
        return _gelu
    if (fused := fused_forward(module)) is not None:
        return fused
    product = _PRODUCTS.get(type(module))
    weight = getattr(module, "weight", None)
    if product is None or not isinstance(weight, Tensor) or weight.numel() < _LEAST_WEIGHTS:
        return None
    return product if goes_to_onednn(weight, weight) else None


def onednn(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """hidden [..., D] with weight [V, D], however it lies, and bias [V] -> [..., V]."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, "none", [], "")
    return out


def is_dense(weight: Tensor) -> bool:
    """Whether this is numbers in memory: quantised weights may look the same, dtype and all, and
    have products of their own."""
    return type(weight) in (Tensor, nn.Parameter)


def goes_to_onednn(hidden: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN can have the product at all, however many rows it has."""
    if weight.device.type != "cpu" or not is_dense(weight):
        return False
    if not hidden.dtype is weight.dtype is torch.float32:
        return False
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def _linear(module: nn.Linear, hidden: Tensor) -> Tensor:
    if not _has_few_rows(hidden, module.weight):
        return nn.Linear.forward(module, hidden)
    return onednn(hidden, module.weight, module.bias)


def _conv1d(module: Any, hidden: Tensor) -> Tensor:
    if not _has_few_rows(hidden, module.weight):
        out: Tensor = Conv1D.forward(module, hidden)  # type: ignore[no-untyped-call]
        return out
    return onednn(hidden, module.weight.T, module.bias)


_PRODUCTS: dict[type, Forward] = {nn.Linear: _linear, Conv1D: _conv1d}


def _has_few_rows(hidden: Tensor, weight: Tensor) -> bool:
    if torch.compiler.is_compiling():  # inductor has products of its own
        return False
    rows = hidden.numel() // hidden.shape[-1]
    return 0 < rows <= _MOST_ROWS and goes_to_onednn(hidden, weight)


def _gelu(_module: nn.Module, hidden: Tensor) -> Tensor:
    return nn.functional.gelu(hidden, approximate="tanh")
