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

from w2s_fast._pages import PassLayout, SplitRule, bucket_of, smallest_bucket
from w2s_fast.attention.kernel import Bounds, KernelPlan, PassFields, lay_out
from w2s_fast.attention.staging import Field, Room, host_buffer, launch_copy
from w2s_fast.cache import NO_COPIES, Int32Array, PagePool
from w2s_fast.kernels.copy_pages import copy_pages, is_one_launch
from w2s_fast.kernels.paged_attention_triton import FEW_KEYS, SPLIT_KEYS, SPLIT_QUERIES

SPLIT_RULE = SplitRule(SPLIT_KEYS, SPLIT_QUERIES, FEW_KEYS)
_COPIES = "copies"  # of pages, before the pass


class Bucket(NamedTuple):
    """Bounds of the passes that one recording serves.

    They choose how many programs are launched and never what is computed for a row: its attention
    is the same in every bucket. How they are chosen: csrc/bucket.h.

    Attributes:
        rows, tokens: S and T. max_q: the most new tokens of a row.
        splits, max_tokens, max_parts: of SharedSegments; N is ``splits``. 0: nothing is shared.
        max_own: see :class:`Bounds`.
        pages: entries of all rows' tables, the longest part of what is copied for a pass.
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
        """The first bucket of so many rows and tokens, of rows of ``most_pages`` at most."""
        return cls(*smallest_bucket(SPLIT_RULE, rows, tokens, max_q, most_pages))

    @classmethod
    def of(cls, bounds: Bounds, rows: int, tokens: int, most_pages: int) -> Bucket:
        """The first bucket of so many rows and tokens that is large enough for a pass."""
        return cls(*bucket_of(SPLIT_RULE, bounds, rows, tokens, most_pages))


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
    _records_copies: bool

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
            more={**more, _COPIES: Field(torch.int32, (2 * bucket.rows,), spare=-1)},
        )

    @classmethod
    def over(cls, bucket: Bucket, pool: PagePool, made: PassFields, buffer: Tensor) -> StaticPlan:
        """The plan of a bucket, over memory uint8 of the bytes of :meth:`fields_of`."""
        # Each page of a row has an entry of its own, in the row's table or in one that it shares.
        max_k = min(bucket.pages * pool.page_size, pool.max_tokens_per_slot)
        bounds = Bounds(
            *(bucket.rows, bucket.tokens, bucket.splits, bucket.pages, bucket.max_q, max_k),
            *(bucket.max_own, bucket.max_tokens, bucket.max_parts),
        )
        tensors = made.fields.tensors(buffer)
        plan = KernelPlan.over(pool, tensors, bounds)
        ours = {name: tensors[name] for name in made.more}
        others = [name for name in made.more if name != _COPIES]
        return cls(plan, ours, buffer, made.fields.nothing(others), made, is_one_launch(pool.kv))

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
        """Take over a pass within the bucket, in one copy; see also :meth:`copy_pages`.

        Args:
            more: values for the first places of those fields; ``spare`` stands behind them.
            copies: pages that the pass reads, at most one a row; see :meth:`PagePool.copy_pages`.
            back: rows stand one token behind, for steps that begin by moving on: the plan is right
                after :meth:`KernelPlan.advance`.
        """
        host = host_buffer(len(self.buffer), self.buffer.device)
        array = host.numpy()
        self.made.write(layout, array, back)
        self.made.fields.fill(array, {**self.nothing, **more, _COPIES: copies.ravel()})
        launch_copy(host, self.buffer)

    def copy_pages(self, count: int) -> None:
        """Copy the first ``count`` pairs of pages that were loaded."""
        if count:
            copy_pages(self.plan.pool.kv, self._pairs[:count])

    def copy_recorded(self) -> None:
        """Within what is recorded: copy all pairs that were loaded, if that can be recorded.

        If not, :meth:`copy_unrecorded` does it beside.
        """
        if self._records_copies:
            copy_pages(self.plan.pool.kv, self._pairs)

    def copy_unrecorded(self, count: int) -> None:
        """Copy the first ``count`` pairs, unless :meth:`copy_recorded` does."""
        if not self._records_copies:
            self.copy_pages(count)

    @property
    def _pairs(self) -> Tensor:
        return self.more[_COPIES].view(-1, 2)
