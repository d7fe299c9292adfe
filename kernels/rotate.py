"""Rotary position embeddings (Su et al., arXiv 2104.09864) of queries and keys in one launch.

transformers computes them by ten operators. Of a decoding step of an 8B with 16 rows, those took
a tenth of the time on an H200 (`python -m bench.end_to_end --only 8B graphs`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from w2s_fast.kernels.library import jit, register, tl, triton

_SERVED = (torch.float16, torch.bfloat16, torch.float32)
# Elements of each half of the heads that one program rotates. Not measured on a GPU.
_TILE = 1024


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by the angles of their positions, halves beside each other.

        out[: D/2] = x[: D/2] * cos[: D/2] - x[D/2 :] * sin[: D/2]
        out[D/2 :] = x[D/2 :] * cos[D/2 :] + x[: D/2] * sin[D/2 :]

    Products and sums are rounded to the dtype of q, one by one, as transformers' are.

    Args:
        q: [B, H, T, D] of any float dtype and any strides, D even. k: [B, Hkv, T, D], likewise.
        cos, sin: [B, T, D] or [1, T, D] of the same dtype.

    Returns:
        q and k rotated, laid out as they are.
    """
    batch, _, tokens, dim = q.shape if q.ndim == 4 else (0, 0, 0, 1)
    if (
        dim % 2
        or k.ndim != 4
        or (k.shape[0], *k.shape[2:]) != (batch, tokens, dim)
        or cos.shape[1:] != (tokens, dim)
        or cos.shape[0] not in (1, batch)
        or sin.shape != cos.shape
    ):
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, cos {tuple(cos.shape)} and sin"
            f" {tuple(sin.shape)} must be [B, H, T, D], [B, Hkv, T, D], and [B or 1, T, D] twice,"
            " with an even D"
        )
    if not q.dtype is k.dtype is cos.dtype is sin.dtype:
        raise ValueError(f"q, k, cos and sin are {q.dtype}, {k.dtype}, {cos.dtype} and {sin.dtype}")
    turned: tuple[Tensor, Tensor] = _operator(q, k, cos, sin)
    return turned


def _torch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos[:, None], sin[:, None]

    def turned(x: Tensor) -> Tensor:
        low, high = x.chunk(2, -1)
        out = x * cos + torch.cat((-high, low), -1) * sin
        return torch.empty_like(x).copy_(out)

    return turned(q), turned(k)


def _fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k)


def _triton(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    if q.dtype not in _SERVED or q.numel() == 0 or k.numel() == 0:
        return _torch(q, k, cos, sin)
    turned = torch.empty_like(q), torch.empty_like(k)
    batch, heads, tokens, dim = q.shape
    lanes = triton.next_power_of_2(dim // 2)
    tile = max(1, min(_TILE // lanes, triton.next_power_of_2(heads)))
    blocks = -(-heads // tile)
    cos_batch, sin_batch = (0 if x.shape[0] == 1 else x.stride(0) for x in (cos, sin))
    _turn[(batch * tokens, blocks + -(-k.shape[1] // tile))](
        q, k, *turned, cos, sin, tokens, blocks, *q.stride(), *k.stride(), *turned[0].stride(),
        *turned[1].stride(), cos_batch, *cos.stride()[1:], sin_batch, *sin.stride()[1:],
        HEADS=heads, KV_HEADS=k.shape[1], HALF=dim // 2, LANES=lanes, TILE=tile,
        num_warps=min(4, max(1, tile * lanes // 256)), enable_fp_fusion=True,
    )  # fmt: skip
    return turned


@jit(do_not_specialize=["tokens", "blocks", "cos_batch", "sin_batch"])
def _turn(
    q, k, new_q, new_k, cos, sin, tokens, blocks,
    q_batch, q_head, q_token, q_lane, k_batch, k_head, k_token, k_lane,
    new_q_batch, new_q_head, new_q_token, new_q_lane,
    new_k_batch, new_k_head, new_k_token, new_k_lane,
    cos_batch, cos_token, cos_lane, sin_batch, sin_token, sin_lane,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, LANES: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Program (token, block of TILE heads): first the blocks of queries, then those of keys."""
    batch = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    block = tl.program_id(1)
    cos += batch * cos_batch + token * cos_token
    sin += batch * sin_batch + token * sin_token
    if block < blocks:
        _turn_heads(
            q + batch * q_batch + token * q_token, q_head, q_lane,
            new_q + batch * new_q_batch + token * new_q_token, new_q_head, new_q_lane,
            cos, cos_lane, sin, sin_lane, block * TILE, HEADS, HALF, LANES, TILE,
        )  # fmt: skip
    else:
        _turn_heads(
            k + batch * k_batch + token * k_token, k_head, k_lane,
            new_k + batch * new_k_batch + token * new_k_token, new_k_head, new_k_lane,
            cos, cos_lane, sin, sin_lane, (block - blocks) * TILE, KV_HEADS, HALF, LANES, TILE,
        )  # fmt: skip


@jit
def _turn_heads(
    x, x_head, x_lane, out, out_head, out_lane, cos, cos_lane, sin, sin_lane, first,
    HEADS: tl.constexpr, HALF: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """TILE heads of a token, from the ``first``. Each product is rounded, and then their sum."""
    lane = tl.arange(0, LANES)
    head = (first + tl.arange(0, TILE)).to(tl.int64)
    inside = lane < HALF
    known = (head < HEADS)[:, None] & inside[None, :]
    at = x + head[:, None] * x_head + lane[None, :] * x_lane
    low = tl.load(at, mask=known, other=0.0)
    high = tl.load(at + HALF * x_lane, mask=known, other=0.0)
    dtype = low.dtype
    low, high = low.to(tl.float32), high.to(tl.float32)
    cos_at, sin_at = cos + lane * cos_lane, sin + lane * sin_lane
    low_cos = tl.load(cos_at, mask=inside, other=0.0).to(tl.float32)[None, :]
    high_cos = tl.load(cos_at + HALF * cos_lane, mask=inside, other=0.0).to(tl.float32)[None, :]
    low_sin = tl.load(sin_at, mask=inside, other=0.0).to(tl.float32)[None, :]
    high_sin = tl.load(sin_at + HALF * sin_lane, mask=inside, other=0.0).to(tl.float32)[None, :]
    new_low = _rounded(low * low_cos, dtype) - _rounded(high * low_sin, dtype)
    new_high = _rounded(high * high_cos, dtype) + _rounded(low * high_sin, dtype)
    at = out + head[:, None] * out_head + lane[None, :] * out_lane
    tl.store(at, new_low.to(dtype), mask=known)
    tl.store(at + HALF * out_lane, new_high.to(dtype), mask=known)


@jit
def _rounded(x, dtype: tl.constexpr):
    return x.to(dtype).to(tl.float32)


_operator = register(
    "rotate(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)",
    torch_path=_torch,
    triton_path=_triton,
    fake=_fake,
)
