"""Log-sum-exp in one pass over a vocabulary that several programs share: the kernels' pieces.

Every program keeps a running maximum m and a sum s = sum exp(x - m) of what it has seen (online
softmax: Milakov and Gimelshein, "Online normalizer calculation for softmax", arXiv 1805.02867) and
leaves them as its split's partial. A second launch merges the partials of a row,

    M = max m_i        logsumexp = M + log sum_i s_i * exp(m_i - M)

in a fixed order. Nothing is added under a lock or atomically, so equal inputs give equal bits.

NaN: a maximum may or may not pass it on, but every x also enters a sum, and there it stays.
+inf becomes NaN the same way (exp(inf - inf)), and -inf adds nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from w2s_fast.kernels.library import constexpr, jit, tl

# Maxima start from the lowest float32 rather than from -inf: exp(-inf - -inf) would be NaN.
LOWEST = constexpr(-3.4028234663852886e38)


@jit
def soften(x, scale, softcap, SOFTCAP: tl.constexpr):
    """softcap * tanh(scale * x / softcap) in float32, or scale * x where SOFTCAP is off."""
    x = x.to(tl.float32) * scale
    if SOFTCAP:
        y = x * (1.0 / softcap)  # one division for all
        # tanh has no instruction that is exact enough on every architecture, and 1 - e cancels
        # for small y: there the odd series to y^9 is good to float32.
        square = y * y
        series = 1 + square * (
            -1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))
        )
        e = tl.exp(-2 * tl.abs(y))
        far = (1 - e) / (1 + e)
        x = softcap * tl.where(tl.abs(y) < 0.3, y * series, tl.where(y < 0, -far, far))
    return x


@jit
def merge(largest, total, AXIS: tl.constexpr):
    """The (maximum, sum) of all partials along an axis."""
    top = tl.max(largest, AXIS)
    return top, tl.sum(total * tl.exp(largest - tl.expand_dims(top, AXIS)), AXIS)


@jit
def logprob_of_row(largest, total, target, row, splits, BLOCK: tl.constexpr):
    """target - logsumexp of a row, from its partials: in the same order whichever kernel asks."""
    start = row.to(tl.int64) * splits
    columns = tl.arange(0, BLOCK)
    m = tl.full([BLOCK], LOWEST, tl.float32)
    s = tl.zeros([BLOCK], tl.float32)
    for first in range(0, splits, BLOCK):
        mask = first + columns < splits
        new_m = tl.load(largest + start + first + columns, mask=mask, other=LOWEST)
        new_s = tl.load(total + start + first + columns, mask=mask, other=0.0)
        top = tl.maximum(m, new_m)
        s = s * tl.exp(m - top) + new_s * tl.exp(new_m - top)
        m = top
    top, sum_of_all = merge(m, s, 0)
    return tl.load(target + row) - top - tl.log(sum_of_all)


# How a row is merged anywhere: block and warps decide the order of the sums, and a fused
# multiply-add, left to the compiler, would decide their rounding.
MERGE_BLOCK = 256
MERGE_OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}


# Where the buffers begin varies with the number of rows: no variant for multiples of 16.
@jit(do_not_specialize=["largest", "total", "target", "out", "splits"])
def _merge_splits(largest, total, target, out, splits, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    tl.store(out + row, logprob_of_row(largest, total, target, row, splits, BLOCK))


def merge_splits(largest: Tensor, total: Tensor, target: Tensor) -> Tensor:
    """target - logsumexp of each row, float32 [N].

    Args:
        largest, total: float32 [N, splits], contiguous: the maximum m of each split of a row, and
            the sum of exp(x - m).
        target: float32 [N], the token's own logit; NaN where the token is no id.
    """
    rows, splits = largest.shape
    out = torch.empty_like(target)
    _merge_splits[(rows,)](
        largest, total, target, out, splits, BLOCK=MERGE_BLOCK, **MERGE_OPTIONS
    )  # fmt: skip
    return out
