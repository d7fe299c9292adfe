"""StaticPlan: a plan at fixed addresses and in fixed shapes, to which passes are copied.

What a recorded pass reads has to stay where it is. Shapes are rounded up to those of a bucket; the
rows and tokens that a bucket has too many belong to nobody: they read no keys, and write nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

from w2s_fast._pages import PassLayout
from w2s_fast.attention.kernel import Bounds, KernelPlan, PassFields, lay_out
from w2s_fast.attention.staging import Field, Room, host_buffer
from w2s_fast.cache import NO_COPIES, Int32Array, PagePool
from w2s_fast.kernels.copy_pages import copy_pages
from w2s_fast.kernels.paged_attention_triton import SPLIT_KEYS, SPLIT_QUERIES

# Pages a row that most buckets have room for: 2,048 tokens with pages of 16.
_PAGES = 128
_COPIES = "copies"  # of pages, before the pass


class Bucket(NamedTuple):
    """Bounds of the passes that one recording serves.

    They choose how many programs are launched and never what is computed for a row: its attention
    is the same in every bucket.

    Attributes:
        rows, tokens: S and T. max_q: the most new tokens of a row.
        splits, max_tokens, max_parts: of SharedSegments; N is ``splits``. 0: nothing is shared.
        max_own: see :class:`Bounds`.
        pages: of a row. With those of all rows, the longest part of what is copied for a pass.
    """

    rows: int
    tokens: int
    max_q: int
    splits: int
    max_tokens: int
    max_parts: int
    max_own: int
    pages: int

    @classmethod
    def smallest(cls, rows: int, tokens: int, max_q: int, most_pages: int) -> Bucket:
        """The first bucket of so many rows and tokens, of rows of ``most_pages`` at most.

        It is enough for 4 x 4 candidates with a prompt of 1,024 tokens. Such a request has a split
        for each 512 tokens of the prompt, one for what its hypotheses have in common, and one for
        each of their 4 histories; a row has up to 4 of them.
        """
        sharing = 16 * min(max_q, SPLIT_QUERIES)
        pages = min(_PAGES, most_pages)
        return cls(rows, tokens, max_q, max(rows // 2, 8), sharing, 4, SPLIT_KEYS, pages)

    @classmethod
    def of(cls, bounds: Bounds, rows: int, tokens: int, most_pages: int) -> Bucket:
        """The first bucket of so many rows and tokens that is large enough for a pass."""
        max_q = 1 << max(0, bounds.max_q - 1).bit_length()
        least = cls.smallest(rows, tokens, max_q, most_pages)
        pages = min(_rung(bounds.pages, least.pages, 4), most_pages)
        max_own = _rung(bounds.max_own, least.max_own, 4)
        if max_q > SPLIT_QUERIES and not bounds.splits:
            # Room for partial results of rows that have none would be most of a pass's memory.
            return cls(rows, tokens, max_q, 0, 0, 0, max_own if bounds.max_own else 0, pages)
        return least._replace(
            splits=_rung(bounds.splits, least.splits, 2),
            max_tokens=_rung(bounds.max_tokens, least.max_tokens, 4),
            max_parts=_rung(bounds.max_parts, least.max_parts, 4),
            max_own=max_own,
            pages=pages,
        )


def _rung(value: int, first: int, factor: int) -> int:
    """The first of ``first``, ``factor * first``, ... that is at least ``value``."""
    while first < value:
        first *= factor
    return first


@dataclass
class StaticPlan:
    """A plan that stays where it is.

    Attributes:
        plan: what a pass attends by: views of ``buffer``.
        more: what was asked for beside it, by name: views of it, too.
        buffer: uint8 [n], on the pool's device.
        nothing: no value for any of ``more``.
        made: where its fields lie in ``buffer``.
    """

    plan: KernelPlan
    more: dict[str, Tensor]
    buffer: Tensor
    nothing: dict[str, NDArray[Any]]
    made: PassFields

    @classmethod
    def cut(
        cls, bucket: Bucket, pool: PagePool, room: Room, more: Mapping[str, Field] = {}
    ) -> StaticPlan:
        """The plan of a bucket, in the same memory as all others of the room.

        What stands in it is not defined before the first :meth:`load` or :meth:`clear`, and no
        longer when another plan of the room was loaded.
        """
        made = cls.fields_of(bucket, more)
        return cls.over(bucket, pool, made, room.take(made.fields.nbytes))

    @staticmethod
    def fields_of(bucket: Bucket, more: Mapping[str, Field] = {}) -> PassFields:
        """What the plan of a bucket is made of."""
        return PassFields(
            bucket.rows,
            bucket.tokens,
            bucket.splits,
            bucket.pages,
            shares=bucket.splits > 0,
            spare=True,
            more={**more, _COPIES: Field(torch.int32, (2 * bucket.rows,))},
        )

    @classmethod
    def over(cls, bucket: Bucket, pool: PagePool, made: PassFields, buffer: Tensor) -> StaticPlan:
        """The plan of a bucket, over memory uint8 of the bytes of :meth:`fields_of`."""
        max_k = bucket.pages * pool.page_size
        bounds = Bounds(
            *(bucket.rows, bucket.tokens, bucket.splits, bucket.pages, bucket.max_q, max_k),
            *(bucket.max_own, bucket.max_tokens, bucket.max_parts),
        )
        tensors = made.fields.tensors(buffer)
        plan = KernelPlan.over(pool, tensors, bounds)
        ours = {name: tensors[name] for name in made.more}
        return cls(plan, ours, buffer, made.fields.nothing(made.more), made)

    def clear(self) -> None:
        """No row is left, and no token."""
        self.load(lay_out(self.plan.pool, [], []))

    def load(
        self,
        layout: PassLayout,
        more: Mapping[str, NDArray[Any]] = {},
        copies: Int32Array = NO_COPIES,
        back: bool = False,
    ) -> None:
        """Take over a pass within the bucket, in one copy; then copy pages, at most one a row.

        Args:
            more: values for the first places of those fields; ``spare`` stands behind them.
            copies: pages that the pass reads; see :meth:`PagePool.copy_pages`.
            back: rows stand one token behind, for steps that begin by moving on: the plan is right
                after :meth:`KernelPlan.advance`.
        """
        host = host_buffer(len(self.buffer), self.buffer.device)
        array = host.numpy()
        self.made.write(layout, array, back)
        self.made.fields.fill(array, {**self.nothing, **more, _COPIES: copies.ravel()})
        self.buffer.copy_(host, non_blocking=True)
        self.copy_pages(len(copies))

    def copy_pages(self, count: int) -> None:
        """Copy the first ``count`` pairs of pages that were loaded."""
        if count:
            copy_pages(self.plan.pool.kv, self.more[_COPIES].view(-1, 2)[:count])
