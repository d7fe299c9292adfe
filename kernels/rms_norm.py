"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467) in one launch.

transformers computes it by seven operators, each of which reads and writes all of its input. Of a
decoding step of an 8B with 16 rows, those took a sixth of the time on an H200
(`python -m bench.end_to_end --only 8B graphs`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from w2s_fast.kernels.library import jit, register, tl, triton

_SERVED = (torch.float16, torch.bfloat16, torch.float32)
# One program holds a row. Not measured on a GPU.
_WIDEST = 16384
# Elements of a program, where rows are so short that it takes several.
_TILE = 1024


def rms_norm(hidden: Tensor, weight: Tensor, eps: float, *, offset: bool = False) -> Tensor:
    """Rows over the root of their mean square, times a weight for each column.

        normed = x / sqrt(mean(x^2) + eps)        in float32, or in float64
        out    = weight * round(normed)           as Llama has it: rounded to the dtype of x before
        out    = round(normed * (1 + weight))     with ``offset``, as Gemma has it

    Args:
        hidden: x, [..., D] of any float dtype. weight: [D] of the same dtype. eps: at least 0.

    Returns:
        [..., D] of that dtype, contiguous.
    """
    if hidden.ndim == 0 or weight.shape != hidden.shape[-1:]:
        raise ValueError(
            f"weight {tuple(weight.shape)} must have the width of hidden {tuple(hidden.shape)}"
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden is {hidden.dtype} and weight {weight.dtype}: they must be the same"
        )
    out: Tensor = _operator(hidden, weight, eps, offset)
    return out


def _torch(hidden: Tensor, weight: Tensor, eps: float, offset: bool) -> Tensor:
    x = hidden.to(torch.promote_types(hidden.dtype, torch.float32)).contiguous()
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    if offset:
        return (normed * (1.0 + weight.to(x.dtype))).to(hidden.dtype)
    return weight * normed.to(hidden.dtype)


def _fake(hidden: Tensor, weight: Tensor, eps: float, offset: bool) -> Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def _triton(hidden: Tensor, weight: Tensor, eps: float, offset: bool) -> Tensor:
    width = hidden.shape[-1]
    if hidden.dtype not in _SERVED or width > _WIDEST or hidden.numel() == 0:
        return _torch(hidden, weight, eps, offset)
    hidden, weight = hidden.contiguous(), weight.contiguous()
    out = torch.empty_like(hidden)
    rows = hidden.numel() // width
    lanes = triton.next_power_of_2(width)
    tile = max(1, min(_TILE // lanes, triton.next_power_of_2(rows)))
    _normalise[(-(-rows // tile),)](
        hidden, weight, out, rows, eps, WIDTH=width, LANES=lanes, TILE=tile, OFFSET=offset,
        num_warps=min(16, max(1, tile * lanes // 512)), enable_fp_fusion=True,
    )  # fmt: skip
    return out


@jit(do_not_specialize=["rows"])
def _normalise(
    hidden, weight, out, rows, eps,
    WIDTH: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """A program has TILE rows."""
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    lane = tl.arange(0, LANES)
    known = (row < rows)[:, None] & (lane < WIDTH)[None, :]
    at = row[:, None] * WIDTH + lane[None, :]
    given = tl.load(hidden + at, mask=known, other=0.0)
    w = tl.load(weight + lane, mask=lane < WIDTH, other=0.0)
    x = given.to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x, 1) / WIDTH + eps)[:, None]
    if OFFSET:
        normed = normed * (1.0 + w.to(tl.float32))[None, :]
    else:
        normed = normed.to(given.dtype).to(tl.float32) * w.to(tl.float32)[None, :]
    tl.store(out + at, normed.to(given.dtype), mask=known)


_operator = register(
    "rms_norm(Tensor hidden, Tensor weight, float eps, bool offset) -> Tensor",
    torch_path=_torch,
    triton_path=_triton,
    fake=_fake,
)
