"""Dense attention in plain torch, whole or in parts that a log-sum-exp puts together.

The keys of a query may be cut into parts that are computed apart: with the log-sum-exp of each
part's logits, the parts' results add up to the softmax over all keys (as in FlashAttention,
arXiv 2205.14135, and its cascades).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from w2s_fast.attention.contract import LayerOptions

# Logits that are held at once where they are held at all, in bytes.
_LOGITS_BYTES = 64 * 2**20


class Part(NamedTuple):
    """Attention over some of the keys.

    Attributes:
        out: [..., H, D], the mean of the values, weighted by the softmax over these keys alone.
        lse: [..., H], the log-sum-exp of their logits, at least float32.
    """

    out: Tensor
    lse: Tensor


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    options: LayerOptions,
) -> Tensor:
    """query [S, Q, H, D], key and value [S, L, Hkv, D], mask bool [S, Q, L] -> [S, Q, H, D].

    The mask tells what a query may see, the window included; every query sees something.
    """
    groups = query.shape[2] // key.shape[2]
    hidden = additive_mask(mask, groups, query.dtype)
    part = partial_attention(query, key, value, hidden, options)
    return with_sinks(part, options).to(query.dtype)


def additive_mask(seen: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """bool [S, Q, L] -> [S, 1, G * Q, L]: 0 where a query may see a key, else -inf.

    The same for the G query heads of a key head, which :func:`partial_attention` lays side by side.
    """
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, -torch.inf).repeat(1, groups, 1)[:, None]


def partial_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: LayerOptions,
    causal: bool = False,
) -> Part:
    """query [S, Q, H, D], key and value [S, L, Hkv, D]: out [S, Q, H, D] and lse [S, Q, H].

    The H / Hkv query heads of a key head are laid beside the queries, so keys and values are read
    once and never repeated. Of the options, the scale and the softcap are applied here.

    Args:
        mask: from :func:`additive_mask`; None: every key is seen. Every query sees something.
        causal: in place of a mask, only where :func:`fused`: query i sees the keys 0 to i.
    """
    sequences, queries, heads, dim = query.shape
    kv_heads = key.shape[2]
    groups = heads // kv_heads
    k, v = key.transpose(1, 2), value.transpose(1, 2)
    q = query.transpose(1, 2)
    if groups > 1:
        q = query.reshape(sequences, queries, kv_heads, groups, dim).permute(0, 2, 3, 1, 4)
        if causal:
            # Query heads by themselves, since the operator counts queries from 0: over views.
            q = q.flatten(0, 1)  # [S * Hkv, G, Q, D]
            k, v = (x.flatten(0, 1)[:, None].expand(-1, groups, -1, -1) for x in (k, v))
        else:
            q = q.flatten(2, 3)  # [S, Hkv, G * Q, D]
    if fused(query, options):
        # The operator behind scaled_dot_product_attention on a CPU, called by its own name since
        # the public function keeps the log-sum-exp to itself.
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, attn_mask=mask, is_causal=causal, scale=options.scale
        )
    else:
        assert not causal
        out, lse = _plain(q, k, v, mask, options)
    if groups == 1:
        return Part(out.transpose(1, 2), lse.transpose(1, 2))
    out = out.reshape(sequences, kv_heads, groups, queries, dim).permute(0, 3, 1, 2, 4)
    lse = lse.reshape(sequences, kv_heads, groups, queries).permute(0, 3, 1, 2)
    return Part(out.flatten(2, 3), lse.flatten(2, 3))


def fused(query: Tensor, options: LayerOptions) -> bool:
    """Whether there is an operator that never holds all the logits, and gives their lse."""
    return query.device.type == "cpu" and options.softcap is None


def merge(whole: Part, part: Part) -> None:
    """Add a part of the keys to others, in place: out [T, H, D] and lse [T, H] of both.

    Where the part's lse is -inf, nothing changes; the whole's is never -inf.
    """
    share = torch.sigmoid(part.lse - whole.lse)
    whole.out.lerp_(part.out.to(whole.out.dtype), share[..., None])
    whole.lse.copy_(torch.logaddexp(whole.lse, part.lse))


def with_sinks(part: Part, options: LayerOptions) -> Tensor:
    """What is left for the values where each head's sink takes its share of the softmax."""
    if options.sinks is None:
        return part.out
    return part.out * torch.sigmoid(part.lse - options.sinks.to(part.lse.dtype))[..., None]


def _plain(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: LayerOptions
) -> tuple[Tensor, Tensor]:
    """q [S, H, Q, D], k and v [S, H, L, D], mask [S, 1, Q, L]: out, lse; a few queries a time."""
    outs, lses = [], []
    at_once = max(1, _LOGITS_BYTES // (4 * q.shape[0] * q.shape[1] * k.shape[2]))
    blocks = torch.split(q, at_once, 2)
    masks = [None] * len(blocks) if mask is None else torch.split(mask, at_once, 2)
    for block, hidden in zip(blocks, masks):
        logits = block @ k.transpose(-1, -2)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * options.scale
        if options.softcap is not None:
            logits = torch.tanh(logits / options.softcap) * options.softcap
        if hidden is not None:
            logits += hidden
        lse = logits.logsumexp(-1)
        outs.append((logits - lse[..., None]).exp().to(v.dtype) @ v)
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)
