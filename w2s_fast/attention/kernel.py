"""Attention through the operators write_kv and paged_attention: wherever Triton serves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from w2s_fast._pages import PassLayout, PassRoom
from w2s_fast.attention.contract import LayerOptions
from w2s_fast.attention.placement import Placement
from w2s_fast.attention.row_tree import RowTree
from w2s_fast.attention.staging import ALIGNMENT, Field, Fields, host_buffer
from w2s_fast.cache import Int32Array, Ints, PagePool, as_int32
from w2s_fast.kernels.paged_attention import SharedSegments, paged_attention
from w2s_fast.kernels.paged_attention_triton import SPLIT_KEYS, SPLIT_QUERIES
from w2s_fast.kernels.write_kv import write_kv

_NONE: Int32Array = np.empty(0, np.int32)


class Bounds(NamedTuple):
    """What a pass needs room for, and what bounds its launches.

    Attributes:
        rows, tokens, splits, pages: S and T, N of SharedSegments, and P, entries of page_table.
        max_q, max_k: the most new tokens, and the most keys of a row.
        max_own: the most keys outside of segments of a row whose keys may be cut, which has at most
            SPLIT_QUERIES new tokens; 0: there is none.
        max_tokens, max_parts: of SharedSegments.
    """

    rows: int
    tokens: int
    splits: int
    pages: int
    max_q: int
    max_k: int
    max_own: int
    max_tokens: int
    max_parts: int

    @classmethod
    def of(cls, layout: PassLayout) -> Bounds:
        return cls(*layout.bounds)


def lay_out(
    pool: PagePool, slots: Ints, counts: Ints, tree: RowTree | None = None, ahead: int = 0
) -> PassLayout:
    """Lay a pass out on the host; see :class:`w2s_fast.attention.Backend` for the arguments."""
    segments = (_NONE,) * 5
    if tree is not None:
        segments = (tree.first, tree.count, tree.begin, tree.end, tree.own)
    return PassLayout(
        pool.manager,
        as_int32(slots),
        as_int32(counts),
        *segments,
        SPLIT_KEYS,
        SPLIT_QUERIES,
        ahead,
    )


class PassFields:
    """What a kernel's plan is made of, in one buffer; and more, that the caller fills in.

    Attributes:
        fields: by the names of what they become in KernelPlan and SharedSegments.
        more: names of those beside.
    """

    def __init__(
        self,
        rows: int,
        tokens: int,
        splits: int,
        pages: int,
        *,
        shares: bool,
        spare: bool,
        more: Mapping[str, Field] = {},
    ) -> None:
        """For so many rows, tokens, splits, and entries of their tables of pages.

        Args:
            shares: whether rows share keys. spare: whether there may be tokens of no row.
            more: fields beside those of the plan.
        """
        int32, int64 = torch.int32, torch.int64
        wanted = {
            "positions": Field(int64, (tokens,)),
            "write": Field(int64, (tokens,)),
            "stride": Field(int64, (tokens,)),
            "page_table": Field(int32, (pages,)),
            "table_start": Field(int32, (rows,)),
            "lengths": Field(int32, (rows,)),
            "cu_seqlens_q": Field(int32, (rows + 1,)),
            "own": Field(int32, (rows,)),
            "parts": Field(int32, (rows,)),
            "token_rows": Field(int32, (tokens,)),
            "splits": Field(int32, (splits, 6)),
        }
        left_out = set() if spare else {"stride"}
        if not shares:
            left_out |= {"own", "parts", "token_rows", "splits"}
        # What is compiled for a tensor at the beginning of its memory is compiled anew for one that
        # lies further on: so none does.
        self.fields = Fields(
            {name: field for name, field in wanted.items() if name not in left_out} | dict(more),
            begin=ALIGNMENT,
        )
        self.more = list(more)
        self._room = (rows, tokens, splits, pages)
        # In the order of PassField in csrc/plan.h.
        self._offsets = np.array([self.fields.offsets.get(name, -1) for name in wanted], np.int64)

    def room_at(self, begin: int) -> PassRoom:
        """Where the plan's fields lie in a larger buffer, of which these begin at a byte."""
        offsets = np.where(self._offsets < 0, self._offsets, self._offsets + begin)
        return PassRoom(offsets, *self._room)

    def write(self, layout: PassLayout, buffer: NDArray[np.uint8], back: bool = False) -> None:
        """Fill in all fields of the plan, in a buffer uint8 [nbytes]; see csrc/plan.h."""
        layout.write(buffer, self._offsets, *self._room, back)


@dataclass(kw_only=True)
class KernelPlan(Placement):
    """Passes over a pool through the operators write_kv and paged_attention.

    Attributes:
        page_table: int32 [P], see paged_attention: what rows share stands there once.
        table_start: int32 [S], where entry 0 of each row is, or would be.
        lengths: int32 [S], the tokens of each row, new ones included.
        cu_seqlens_q: int32 [S + 1], where each row's new tokens begin.
        max_q, max_k, max_own: see :class:`Bounds`.
        shared: which keys rows have in common; None: none, or it would not pay.
    """

    table_start: Tensor
    lengths: Tensor
    cu_seqlens_q: Tensor
    max_q: int
    max_k: int
    max_own: int
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
        layout = lay_out(pool, slots, counts, tree, ahead)
        bounds = Bounds.of(layout)
        made = PassFields(*bounds[:4], shares=bounds.splits > 0, spare=False)
        buffer = host_buffer(made.fields.nbytes, pool.device)
        made.write(layout, buffer.numpy())
        there = buffer.to(pool.device, non_blocking=True)
        return cls.over(pool, made.fields.tensors(there), bounds)

    @classmethod
    def over(cls, pool: PagePool, tensors: dict[str, Tensor], bounds: Bounds) -> KernelPlan:
        """The plan that those tensors make, by the names of PassFields."""
        shared = None
        if "splits" in tensors:
            shared = SharedSegments(
                own=tensors["own"],
                parts=tensors["parts"],
                token_rows=tensors["token_rows"],
                splits=tensors["splits"],
                max_tokens=bounds.max_tokens,
                max_parts=bounds.max_parts,
                max_own=bounds.max_own,
            )
        return cls(
            pool=pool,
            page_table=tensors["page_table"],
            table_start=tensors["table_start"],
            positions=tensors["positions"],
            write=tensors["write"],
            stride=tensors.get("stride", 1),
            lengths=tensors["lengths"],
            cu_seqlens_q=tensors["cu_seqlens_q"],
            max_q=bounds.max_q,
            max_k=bounds.max_k,
            max_own=bounds.max_own,
            shared=shared,
        )

    def advance(self) -> None:
        """Move on by a token a row, in place. What is shared stays as it is."""
        super().advance()
        self.lengths += self.stride

    def page_of(self, entry: Tensor) -> Tensor:
        return self.page_table[self.table_start + entry]

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
            max_own=self.max_own,
            shared=self.shared,
            table_start=self.table_start,
        )
