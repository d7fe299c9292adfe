"""Attention through the operators write_kv and paged_attention: wherever Triton serves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from w2s_fast.gathered_attention import LayerOptions
from w2s_fast.kernels.paged_attention import paged_attention
from w2s_fast.kernels.write_kv import write_kv
from w2s_fast.pages import Ints, PagePool
from w2s_fast.row_tree import RowTree


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
    """

    pool: PagePool
    write: Tensor
    positions: Tensor
    page_table: Tensor
    lengths: Tensor
    cu_seqlens_q: Tensor
    max_q: int
    max_k: int

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
        new = np.asarray(counts, np.int32)
        old = pool.lengths(slots)
        start = np.concatenate(([0], new.cumsum())).astype(np.int32)
        offset = np.arange(start[-1]) - np.repeat(start[:-1], new)

        def on_device(array: NDArray[np.integer]) -> Tensor:
            return torch.from_numpy(array).to(pool.device, non_blocking=True)

        return cls(
            pool=pool,
            write=pool.slot_mapping(slots, counts),
            positions=on_device(np.repeat(old, new).astype(np.int64) + offset),
            page_table=pool.page_table(slots),
            lengths=on_device(old + new),
            cu_seqlens_q=on_device(start),
            max_q=int(new.max()),
            max_k=int((old + new).max()) + ahead,
        )

    def advance(self) -> None:
        """Move on by one token a row, in place."""
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
        )
