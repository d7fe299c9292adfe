"""In place of flash-attn 2 and 3: functions with their parameters, in their order and with their
defaults, that compute in plain torch what the libraries document for exactly what they are given.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def attend_row(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, window: Any, cap: float
) -> Tensor:
    """query [Q, H, D], key and value [L, Hkv, D] -> [Q, H, D]; in float64."""
    queries, heads, _ = query.shape
    keys, kv_heads, _ = key.shape
    key, value = (x.repeat_interleave(heads // kv_heads, 1).double() for x in (key, value))
    logits = torch.einsum("qhd,khd->hqk", query.double(), key) * scale
    if cap > 0:
        logits = cap * torch.tanh(logits / cap)
    # Aligned to the bottom right corner: the last query is at the last key.
    behind = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
    left, right = window
    right = 0 if causal else right
    seen = torch.ones_like(behind, dtype=torch.bool)
    if left >= 0:
        seen &= behind <= left
    if right >= 0:
        seen &= -behind <= right
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("hqk,khd->qhd", weights, value).to(query.dtype)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    lengths: Tensor,
    table: Tensor,
    *rest: Any,
) -> Tensor:
    for tensor in (cu_seqlens_q, lengths, table):
        assert tensor.dtype == torch.int32 and tensor.is_contiguous()
    rows, page_size = len(lengths), k.shape[1]
    assert cu_seqlens_q.shape == (rows + 1,) and int(cu_seqlens_q[-1]) == len(q)
    assert len(table) == rows and int(table.min()) >= 0 and int(table.max()) < len(k)
    assert k.ndim == 4 and k.shape == v.shape and k.stride(-1) == v.stride(-1) == 1
    out = torch.full_like(q, torch.nan)
    for row, length in enumerate(lengths.tolist()):
        own = slice(int(cu_seqlens_q[row]), int(cu_seqlens_q[row + 1]))
        pages = table[row, : -(-length // page_size)].long()
        key, value = (x[pages].flatten(0, 1)[:length] for x in (k, v))
        out[own] = attend_row(q[own], key, value, *rest)
    return out


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """Of flash-attn 2.6 to 2.8."""
    assert dropout_p == 0 and alibi_slopes is None and not return_attn_probs
    assert block_table is not None
    lengths = cu_seqlens_k.diff()
    assert int(cu_seqlens_k[0]) == 0 and cu_seqlens_k.dtype == torch.int32
    assert max_seqlen_q >= int(cu_seqlens_q.diff().max()) and max_seqlen_k >= int(lengths.max())
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return attend(q, k, v, cu_seqlens_q, lengths, block_table, scale, causal, window_size, softcap)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor:
    """Of flash-attn 3."""
    unused = (k, v, qv, rotary_cos, rotary_sin, cache_batch_idx, cache_leftpad, cu_seqlens_k_new)
    assert all(tensor is None for tensor in unused) and attention_chunk == 0
    assert not return_softmax_lse and num_splits == 1
    assert cu_seqlens_q is not None and page_table is not None and max_seqlen_q is not None
    assert isinstance(cache_seqlens, Tensor) and max_seqlen_q >= int(cu_seqlens_q.diff().max())
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return attend(
        q, k_cache, v_cache, cu_seqlens_q, cache_seqlens, page_table,
        scale, causal, window_size, softcap,
    )  # fmt: skip


def modules() -> dict[str, ModuleType]:
    """By the names that the libraries are imported under."""
    second, third = ModuleType("flash_attn"), ModuleType("flash_attn_interface")
    second.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    third.flash_attn_with_kvcache = flash_attn_with_kvcache  # type: ignore[attr-defined]
    return {"flash_attn": second, "flash_attn_interface": third}
