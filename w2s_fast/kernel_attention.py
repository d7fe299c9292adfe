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
from w2s_fast.pages import Int32Array, Ints, PagePool
from w2s_fast.placement import Placement, Spans
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


@dataclass(kw_only=True)
class KernelPlan(Placement):
    """Passes over a pool through the operators write_kv and paged_attention.

    Attributes:
        lengths: int32 [S], the tokens of each row, new ones included.
        cu_seqlens_q: int32 [S + 1], where each row's new tokens begin.
        max_q, max_k: the most new tokens and the most keys of a row.
        shared: which keys rows have in common; None: none, or it would not pay.
    """

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
        spans = Spans.of(pool, slots, counts)
        new, longest = spans.new, spans.old + spans.new
        tree = RowTree.of([], len(new)) if tree is None else tree.only(new <= SPLIT_QUERIES)
        segments = SplitSegments.of(tree, new, SPLIT_KEYS) if tree.shares else ()
        lengths, cu_seqlens_q, *tables = _to_device([longest, spans.start, *segments], pool.device)
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
                max_own=int((longest - tree.own).max()) + ahead,
            )
        return cls(
            **vars(Placement.at(pool, slots, spans)),
            lengths=lengths,
            cu_seqlens_q=cu_seqlens_q,
            max_q=int(new.max()),
            max_k=int(longest.max()) + ahead,
            shared=shared,
        )

    def advance(self) -> None:
        """Move on by a token a row, in place. What is shared stays as it is."""
        super().advance()
        self.lengths += self.stride

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
