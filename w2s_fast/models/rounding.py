"""Whether two ways to compute the same thing differ by rounding only."""

from __future__ import annotations

import torch
from torch import Tensor

# Largest difference, as a share of the largest value, that is still rounding: float32 sums differ
# by their order, half precision by its spacing.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_TOLERANCE_HALF = 0.1
_HUGE = 1e3  # times the median: such a value is not compared with


def agree(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> bool:
    """Whether two ways to compute logits or states [T, V] differ by rounding only.

    Infinities and NaN must stand in the same places. A few huge logits, as for tokens that a bias
    rules out, do not make the others' differences look small.

    Args:
        dtype: of what computed them.
    """
    if ours.shape != theirs.shape:
        return False
    tolerance = _TOLERANCE.get(dtype, _TOLERANCE_HALF)
    ours, theirs = ours.double(), theirs.double()
    size = theirs[theirs.isfinite()].abs()
    usual = size[size <= _HUGE * size.median()] if len(size) else size
    room = tolerance * float(usual.max()) if len(usual) else 0.0
    return torch.allclose(ours, theirs, rtol=tolerance, atol=room + 1e-6, equal_nan=True)
