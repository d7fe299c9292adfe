"""Attention through the operators write_kv and paged_attention: wherever Triton serves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from w2s_fast.attention.contract import LayerOptions
from w2s_fast.attention.placement import Placement, Spans
from w2s_fast.attention.row_tree import RowTree
from w2s_fast.attention.split_segments import SplitSegments
from w2s_fast.cache import Int32Array, Ints, PagePool
from w2s_fast.kernels.paged_attention import SharedSegments, paged_attention
from w2s_fast.kernels.paged_attention_triton import SPLIT_KEYS, SPLIT_QUERIES
from w2s_fast.kernels.write_kv import write_kv


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
