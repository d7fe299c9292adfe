"""Write new keys and values into the pages of one layer: the paged KV cache of PagedAttention
(Kwon et al., arXiv 2309.06180), filled where the page manager says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from w2s_fast.kernels.library import jit, register, tl, triton

_SERVED = (torch.float16, torch.bfloat16, torch.float32)
# Elements of keys that one program copies, and as many of values. Not measured on a GPU.
_TILE = 2048


def write_kv(k: Tensor, v: Tensor, pages: Tensor, places: Tensor) -> None:
    """Scatter T tokens into one layer's pages, in place.

        pages[0, place // page_size, place % page_size] = k_t      with place = places_t >= 0
        pages[1, place // page_size, place % page_size] = v_t

    Args:
        k, v: [T, Hkv, D] of any float dtype, at any strides; rounded to that of ``pages``.
        pages: [2, P, page_size, Hkv, D], one layer of a pool, contiguous. Changed in place.
        places: int64 [T], positions below P * page_size. A token whose place is negative is left
            out; no two others may have the same one.
    """
    if pages.ndim != 5 or pages.shape[0] != 2 or not pages.is_contiguous():
        raise ValueError(
            f"pages {tuple(pages.shape)} must be [2, P, page_size, Hkv, D] and contiguous"
        )
    shape = (*places.shape, *pages.shape[3:])
    if places.ndim != 1 or k.shape != shape or v.shape != shape:
        raise ValueError(
            f"k {tuple(k.shape)}, v {tuple(v.shape)} and places {tuple(places.shape)} must be"
            f" [T, Hkv, D], [T, Hkv, D] and [T] for pages {tuple(pages.shape)}"
        )
    _operator(k, v, pages, places)


def _torch(k: Tensor, v: Tensor, pages: Tensor, places: Tensor) -> None:
    kept = places >= 0
    if not kept.all():
        k, v, places = k[kept], v[kept], places[kept]
    flat = pages.flatten(1, 2)
    flat[0].index_copy_(0, places, k.to(pages.dtype))
    flat[1].index_copy_(0, places, v.to(pages.dtype))


def _fake(k: Tensor, v: Tensor, pages: Tensor, places: Tensor) -> None:
    return None


def _triton(k: Tensor, v: Tensor, pages: Tensor, places: Tensor) -> None:
    tokens, heads, dim = k.shape
    if k.dtype not in _SERVED or v.dtype not in _SERVED or pages.dtype not in _SERVED:
        return _torch(k, v, pages, places)
    if k.numel() == 0:
        return None
    k = k if k.stride(2) == 1 else k.contiguous()
    v = v if v.stride(2) == 1 else v.contiguous()
    lanes = triton.next_power_of_2(dim)
    tile = max(1, min(triton.next_power_of_2(heads), _TILE // lanes))
    _scatter[(tokens, -(-heads // tile))](
        k, v, pages, places, k.stride(0), k.stride(1), v.stride(0), v.stride(1), pages.stride(0),
        HEADS=heads, DIM=dim, TILE=tile, LANES=lanes, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return None


@jit(do_not_specialize=["places"])
def _scatter(
    k, v, pages, places, k_token, k_head, v_token, v_head, values,
    HEADS: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Program (token, block of TILE heads). Values lie ``values`` elements behind the keys."""
    token = tl.program_id(0).to(tl.int64)
    place = tl.load(places + token)
    if place < 0:
        return
    head = tl.program_id(1) * TILE + tl.arange(0, TILE)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    inside = (head < HEADS) & (lane < DIM)
    new_k = tl.load(k + token * k_token + head * k_head + lane, mask=inside)
    new_v = tl.load(v + token * v_token + head * v_head + lane, mask=inside)
    # HEADS and DIM are constants, so that the compiler sees how the places are aligned.
    at = pages + place * (HEADS * DIM) + head * DIM + lane
    tl.store(at, new_k.to(pages.dtype.element_ty), mask=inside)
    tl.store(at + values, new_v.to(pages.dtype.element_ty), mask=inside)


_operator = register(
    "write_kv(Tensor k, Tensor v, Tensor(a!) pages, Tensor places) -> ()",
    torch_path=_torch,
    triton_path=_triton,
    fake=_fake,
)
