"""Attention through the operators write_kv and paged_attention: wherever Triton serves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from w2s_fast.gathered_attention import LayerOptions
from w2s_fast.kernels.paged_attention import SharedSegments, paged_attention
from w2s_fast.kernels.paged_attention_triton import SPLIT_KEYS, SPLIT_QUERIES
from w2s_fast.kernels.write_kv import write_kv
from w2s_fast.pages import Int32Array, Ints, PagePool, as_int32
from w2s_fast.row_tree import RowTree


class SplitSegments(NamedTuple):
    """The segments of a tree, cut into splits: on the host what SharedSegments is on the device.

    Attributes:
        own, parts: int32 [S]. token_rows: int32 [T]. splits: int32 [N, 6].
    """

    own: Int32Array
    parts: Int32Array
    token_rows: Int32Array
    splits: Int32Array

    @classmethod
    def of(cls, tree: RowTree, new: Int32Array, split_keys: int) -> SplitSegments:
        """Splits of ``split_keys`` keys, the last one of each segment of what is left.

        ``new``: int32 [S], the new tokens of each row.
        """
        start = np.concatenate(([0], new.cumsum()))
        first_token = start[tree.first]
        tokens = start[tree.first + tree.count] - first_token
        cuts = -(-(tree.end - tree.begin) // split_keys)
        parts = np.zeros(len(new), np.int32)
        before = np.empty_like(cuts)
        # 1 us a segment. With W = 4, a request has five: array operations would take 30 us for it.
        for i, (first, count) in enumerate(zip(tree.first.tolist(), tree.count.tolist())):
            before[i] = parts[first]
            parts[first : first + count] += cuts[i]
        segment = np.repeat(np.arange(len(cuts)), cuts)
        index = np.arange(len(segment)) - np.repeat(cuts.cumsum() - cuts, cuts)
        begin = tree.begin[segment] + index * split_keys
        end = np.minimum(begin + split_keys, tree.end[segment])
        part = before[segment] + index
        columns = (first_token[segment], tokens[segment], begin, end, tree.first[segment], part)
        splits = np.stack(columns, axis=1).astype(np.int32)
        longest_first = np.argsort(begin - end, kind="stable")
        token_rows = np.repeat(np.arange(len(new), dtype=np.int32), new)
        return cls(tree.own, parts, token_rows, splits[longest_first])


@dataclass
class KernelPlan:
    """One forward pass over a pool through the operators write_kv and paged_attention.

    Attributes:
        pool: the pages of the model that runs.
        write: int64 [T] positions in the pages for the new keys and values.
        positions: int64 [T], each token's position in its sequence.
        page_table: int32 [S, M]. lengths: int32 [S], new tokens included. cu_seqlens_q:
            int32 [S + 1], where each sequence's new tokens begin.
        max_q, max_k: the most new tokens and the most keys of a sequence.
        shared: which keys rows have in common; None: none, or it would not pay.
    """

    pool: PagePool
    write: Tensor
    positions: Tensor
    page_table: Tensor
    lengths: Tensor
    cu_seqlens_q: Tensor
    max_q: int
    max_k: int
    shared: SharedSegments | None

    @classmethod
    def make(
        cls,
        pool: PagePool,
        slots: Ints,
        counts: Ints,
        tree: RowTree | None = None,
        ahead: int = 0,
    ) -> KernelPlan:
        """See :class:`w2s_fast.attention.Backend`."""
        new = as_int32(counts)
        old = pool.lengths(slots)
        start = np.concatenate(([0], new.cumsum())).astype(np.int32)
        offset = np.arange(start[-1]) - np.repeat(start[:-1], new)
        tree = RowTree.of([], len(new)) if tree is None else tree.only(new <= SPLIT_QUERIES)
        segments = SplitSegments.of(tree, new, SPLIT_KEYS) if tree.shares else ()
        lengths, cu_seqlens_q, *tables = _to_device([old + new, start, *segments], pool.device)
        shared = None
        if segments:
            own, parts, token_rows, splits = tables
            shared = SharedSegments(
                own,
                parts,
                token_rows,
                splits,
                max_tokens=int(segments.splits[:, 1].max()),
                max_parts=int(segments.parts.max()),
                max_own=int((old + new - tree.own).max()) + ahead,
            )
        positions = torch.from_numpy(np.repeat(old, new) + offset)
        return cls(
            pool=pool,
            write=pool.slot_mapping(slots, counts),
            positions=positions.to(pool.device, non_blocking=True),
            page_table=pool.page_table(slots),
            lengths=lengths,
            cu_seqlens_q=cu_seqlens_q,
            max_q=int(new.max()),
            max_k=int((old + new).max()) + ahead,
            shared=shared,
        )

    def advance(self) -> None:
        """Move on by one token a row, in place. What is shared stays as it is."""
        self.positions += 1
        self.lengths += 1
        size = self.pool.page_size
        page = self.page_table.gather(1, (self.positions // size)[:, None])[:, 0]
        self.write.copy_(page * size + self.positions % size)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: LayerOptions,
    ) -> Tensor:
        """Write the new keys and values, then attend over all of each sequence's pages."""
        pages = self.pool.kv[layer]
        write_kv(key, value, pages, self.write)
        return paged_attention(
            query,
            pages,
            self.page_table,
            self.lengths,
            self.cu_seqlens_q,
            **options._asdict(),
            max_q=self.max_q,
            max_k=self.max_k,
            shared=self.shared,
        )


def _to_device(arrays: Sequence[Int32Array], device: torch.device) -> list[Tensor]:
    """All arrays in one copy: int32 tensors of the same shapes, side by side in one buffer."""
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
    parts = torch.split(flat.to(device, non_blocking=True), [array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays)]
