"""Attention over pages in plain torch: gather the keys of like rows, then one dense product.

The CPU's path, and that of any device without the kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from w2s_fast.pages import Int32Array, Ints, PagePool, as_int32
from w2s_fast.row_tree import RowTree

# Keys and values gathered for one group of sequences, in bytes: they should stay in the last-level
# cache between the copy and the product.
_GROUP_BYTES = 32 * 2**20


class LayerOptions(NamedTuple):
    """What an attention layer asks for beside its tensors.

    Attributes:
        scale: factor on query . key.
        window: how many keys a query sees, its own included; None: all before it.
        softcap: of the scaled logits; None is off.
        sinks: [H], one more logit for each head; None: none.
    """

    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None


@dataclass
class _Group:
    """Sequences of one plan that are computed together, padded to Q queries and L keys.

    Attributes:
        queries: int64 [S, Q] indices into the T tokens; padding repeats a sequence's first.
        real: bool [S, Q] or None if nothing is padded.
        keys: int64 [S, L] positions in the pages; those past a sequence's end repeat its first,
            since unwritten pages may hold NaN, which no mask would stop.
        distance: int32 [S, Q, L]: how far a key lies behind a query; negative: in its future.
    """

    queries: Tensor
    real: Tensor | None
    keys: Tensor
    distance: Tensor
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> Tensor:
        """bool [S, Q, L]: True where a query may see a key. Made once for all layers."""
        if window not in self._masks:
            seen = self.distance >= 0
            self._masks[window] = seen if window is None else seen & (self.distance < window)
        return self._masks[window]


@dataclass
class GatheredPlan:
    """One forward pass over a pool: T new tokens of S sequences, in groups of like length.

    Attributes:
        pool: the pages of the model that runs.
        write: int64 [T] positions in the pages for the new keys and values.
        positions: int64 [T], each token's position in its sequence.
        groups: the sequences, grouped by like lengths.
        in_order: the only group holds every token in order, so nothing need be scattered back.
    """

    pool: PagePool
    write: Tensor
    positions: Tensor
    groups: list[_Group]
    in_order: bool
    slots: Int32Array

    @classmethod
    def make(
        cls,
        pool: PagePool,
        slots: Ints,
        counts: Ints,
        tree: RowTree | None = None,
        ahead: int = 0,
    ) -> GatheredPlan:
        """See :class:`w2s_fast.attention.Backend`."""
        new = np.asarray(counts, np.int64)
        old = pool.lengths(slots).astype(np.int64)
        start = np.concatenate(([0], new.cumsum()))
        offset = np.arange(start[-1]) - np.repeat(start[:-1], new)
        positions = torch.from_numpy(np.repeat(old, new) + offset).to(pool.device)
        table = pool.page_table(slots).long()
        members = list(_group_by_length(new, old + new, pool))
        groups = [_make_group(pool, table, m, new, old, start) for m in members]
        in_order = len(groups) == 1 and groups[0].real is None and _ascending(members[0])
        write = pool.slot_mapping(slots, counts)
        return cls(pool, write, positions, groups, in_order, as_int32(slots))

    def advance(self) -> None:
        """Move on by one token a row."""
        # The pool has counted the tokens of the last pass.
        following = GatheredPlan.make(self.pool, self.slots, np.ones(len(self.slots), np.int32))
        self.positions.copy_(following.positions)
        self.write, self.groups = following.write, following.groups
        self.in_order = following.in_order

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: LayerOptions,
    ) -> Tensor:
        """Write the new keys and values, then attend over all of each sequence's pages."""
        kv = self.pool.kv[layer].flatten(1, 2)  # [2, pages * page_size, Hkv, D]
        kv[0].index_copy_(0, self.write, key.to(kv.dtype))
        kv[1].index_copy_(0, self.write, value.to(kv.dtype))
        out = None if self.in_order else torch.empty_like(query)
        for group in self.groups:
            part = dense_attention(
                query[group.queries],
                kv[0][group.keys],
                kv[1][group.keys],
                group.mask(options.window),
                options,
            )
            if out is None:
                return part.flatten(0, 1)
            if group.real is None:
                out[group.queries.flatten()] = part.flatten(0, 1)
            else:
                out[group.queries[group.real]] = part[group.real]
        assert out is not None
        return out


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    options: LayerOptions,
) -> Tensor:
    """query [S, Q, H, D], key and value [S, L, Hkv, D], mask bool [S, Q, L] -> [S, Q, H, D].

    The H / Hkv query heads of a key head are laid beside the queries, so keys and values are read
    once and never repeated.
    """
    sequences, queries, heads, dim = query.shape
    kv_heads = key.shape[2]
    scale, _, softcap, sinks = options  # the mask knows of the window
    shape = (sequences, queries, kv_heads, heads // kv_heads, dim)
    q = query.reshape(shape).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [S, Hkv, G * Q, D]
    k, v = key.transpose(1, 2), value.transpose(1, 2)
    allowed = mask[:, None].repeat(1, 1, heads // kv_heads, 1)  # [S, 1, G * Q, L]
    if softcap is None and sinks is None:
        out = nn.functional.scaled_dot_product_attention(q, k, v, allowed, scale=scale)
    else:
        logits = (q @ k.transpose(-1, -2)).float() * scale
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        logits = logits.masked_fill(~allowed, -torch.inf)
        if sinks is not None:
            sink = sinks.float().view(1, kv_heads, -1, 1).repeat_interleave(queries, 2)
            logits = torch.cat([logits, sink.expand(sequences, -1, -1, -1)], dim=-1)
        out = logits.softmax(-1)[..., : k.shape[2]].to(v.dtype) @ v
    out = out.reshape(sequences, kv_heads, heads // kv_heads, queries, dim)
    return out.permute(0, 3, 1, 2, 4).reshape(sequences, queries, heads, dim)


def _group_by_length(
    new: NDArray[np.int64], total: NDArray[np.int64], pool: PagePool
) -> Iterator[NDArray[np.int64]]:
    """Cut the sequences into groups of like shape, so that padding stays small."""
    limit = max(1, _GROUP_BYTES * pool.kv.shape[0] // pool.bytes_per_token)  # keys of one layer
    order = np.arange(len(new))
    if not _alike(new.min(), new.max(), 0) or not _alike(total.min(), total.max(), 64):
        order = np.lexsort((total, new))
    start = 0
    longest = 0
    for end, i in enumerate(order):
        longest = max(longest, int(total[i]))
        first = order[start]
        if end > start and not (
            _alike(new[first], new[i], 0)
            and _alike(total[order[start:end]].min(), longest, 64)
            and longest * (end - start + 1) <= limit
        ):
            yield order[start:end]
            start, longest = end, int(total[i])
    yield order[start:]


def _alike(small: int, large: int, slack: int) -> bool:
    return large <= 2 * small + slack and (slack > 0 or small > 1 or large == 1)


def _make_group(
    pool: PagePool,
    table: Tensor,
    members: NDArray[np.int64],
    new: NDArray[np.int64],
    old: NDArray[np.int64],
    start: NDArray[np.int64],
) -> _Group:
    queries_max, keys_max = int(new[members].max()), int((old + new)[members].max())
    device = pool.device
    rows = torch.from_numpy(members).to(device)
    count, before, first = (torch.from_numpy(a[members]).to(device) for a in (new, old, start))
    q = torch.arange(queries_max, device=device)
    k = torch.arange(keys_max, device=device)
    real = None if bool((new[members] == queries_max).all()) else q < count[:, None]
    queries = first[:, None] + (q if real is None else torch.where(real, q, 0))
    written = k < (before + count)[:, None]
    place = torch.where(written, k, 0)
    pages = table[rows].gather(1, place // pool.page_size)
    keys = pages * pool.page_size + place % pool.page_size
    distance = (before[:, None] + q)[:, :, None] - torch.where(written, k, keys_max)[:, None, :]
    if real is not None:  # a padded query sees the first key, so that its softmax is not 0 / 0
        distance = torch.where(real[:, :, None], distance, (k > 0).int().neg())
    return _Group(queries, real, keys, distance.int())


def _ascending(members: NDArray[np.int64]) -> bool:
    return bool((np.diff(members) == 1).all())
