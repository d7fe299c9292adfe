"""StaticPlan: a plan at fixed addresses and in fixed shapes, into which others are copied.

What a recorded pass reads has to stay where it is. Shapes are rounded up to those of a bucket; the
rows and tokens that a bucket has too many belong to nobody: they read no keys, and write nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from w2s_fast.attention.kernel import KernelPlan
from w2s_fast.cache import PagePool
from w2s_fast.kernels.paged_attention import SharedSegments
from w2s_fast.kernels.paged_attention_triton import SPLIT_KEYS, SPLIT_QUERIES


class Bucket(NamedTuple):
    """Bounds of the plans that one recording serves.

    They choose how many programs are launched and never what is computed for a row: its attention
    is the same in every bucket.

    Attributes:
        rows, tokens: S and T. max_q: the most new tokens of a row.
        splits, max_tokens, max_parts, max_own: of SharedSegments; N is ``splits``.
    """

    rows: int
    tokens: int
    max_q: int
    splits: int
    max_tokens: int
    max_parts: int
    max_own: int

    @classmethod
    def smallest(cls, rows: int, tokens: int, max_q: int) -> Bucket:
        """The first bucket of so many rows and tokens.

        It is enough for 4 x 4 candidates with a prompt of 1,024 tokens. Such a request has a split
        for each 512 tokens of the prompt, one for what its hypotheses have in common, and one for
        each of their 4 histories; a row has up to 4 of them.
        """
        return cls(rows, tokens, max_q, max(rows, 8), 16 * max_q, 4, SPLIT_KEYS)

    @classmethod
    def of(cls, plan: KernelPlan, rows: int, tokens: int) -> Bucket:
        """The first bucket of so many rows and tokens that is large enough for a plan."""
        max_q = 1 << (plan.max_q - 1).bit_length()
        least, shared = cls.smallest(rows, tokens, max_q), plan.shared
        if shared is None:
            return least._replace(max_own=_rung(plan.max_k, least.max_own))
        return least._replace(
            splits=_rung(len(shared.splits), least.splits),
            max_tokens=_rung(shared.max_tokens, least.max_tokens),
            max_parts=_rung(shared.max_parts, least.max_parts),
            max_own=_rung(shared.max_own, least.max_own),
        )


def _rung(value: int, first: int) -> int:
    """The first of ``first``, 4 * ``first``, ... that is at least ``value``: few recordings."""
    while first < value:
        first *= 4
    return first


def can_be_static(plan: object) -> bool:
    """Whether a StaticPlan can take this one over."""
    return isinstance(plan, KernelPlan) and plan.max_q <= SPLIT_QUERIES


@dataclass
class StaticPlan:
    """A plan that stays where it is.

    Attributes:
        plan: what a pass attends by. Its tensors are those below, or never change.
        stride: int64 [T], 1 for tokens of rows and 0 for others; see Placement.
        shared: ``plan.shared``.
    """

    plan: KernelPlan
    stride: Tensor
    shared: SharedSegments

    @classmethod
    def room(cls, pool: PagePool, rows: int, tokens: int) -> StaticPlan:
        """Room for ``rows`` rows and ``tokens`` tokens, of which :meth:`cut` makes plans."""

        def numbers(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=pool.device)

        int32, int64 = torch.int32, torch.int64
        shared = SharedSegments(
            own=numbers(int32, rows),
            parts=numbers(int32, rows),
            token_rows=numbers(int32, tokens),
            splits=numbers(int32, 0, 6),
            max_tokens=0,
            max_parts=0,
            max_own=0,
        )
        stride = numbers(int64, tokens)
        plan = KernelPlan(
            pool=pool,
            page_table=numbers(int32, rows, pool.max_tokens_per_slot // pool.page_size),
            positions=numbers(int64, tokens),
            write=numbers(int64, tokens),
            stride=stride,
            lengths=numbers(int32, rows),
            cu_seqlens_q=numbers(int32, rows + 1),
            max_q=0,
            max_k=pool.max_tokens_per_slot,
            shared=shared,
        )
        return cls(plan, stride, shared)

    def cut(self, bucket: Bucket) -> StaticPlan:
        """The plan of a bucket, in the same memory as all others; only its splits are its own."""
        rows, tokens, whole = bucket.rows, bucket.tokens, self.plan
        splits = self.shared.splits.new_zeros(bucket.splits, 6)
        shared = SharedSegments(
            self.shared.own[:rows],
            self.shared.parts[:rows],
            self.shared.token_rows[:tokens],
            splits,
            bucket.max_tokens,
            bucket.max_parts,
            bucket.max_own,
        )
        stride = self.stride[:tokens]
        plan = KernelPlan(
            pool=whole.pool,
            page_table=whole.page_table[:rows],
            positions=whole.positions[:tokens],
            write=whole.write[:tokens],
            stride=stride,
            lengths=whole.lengths[:rows],
            cu_seqlens_q=whole.cu_seqlens_q[: rows + 1],
            max_q=bucket.max_q,
            max_k=whole.max_k,
            shared=shared,
        )
        return StaticPlan(plan, stride, shared)

    def clear(self) -> None:
        """No row is left, and no token."""
        ours, shared = self.plan, self.shared
        for tensor in (
            *(ours.positions, ours.lengths, ours.cu_seqlens_q, self.stride),
            *(shared.own, shared.parts, shared.token_rows, shared.splits),
        ):
            tensor.zero_()
        ours.write.fill_(-1)
        ours.page_table[:, 0] = -1  # where a row without pages comes to: nowhere

    def load(self, plan: KernelPlan) -> None:
        """Take over a plan within the bucket."""
        self.clear()
        ours, rows, tokens = self.plan, len(plan.lengths), len(plan.positions)
        ours.page_table[:rows, : plan.page_table.shape[1]].copy_(plan.page_table)
        ours.positions[:tokens].copy_(plan.positions)
        ours.write[:tokens].copy_(plan.write)
        ours.lengths[:rows].copy_(plan.lengths)
        ours.cu_seqlens_q[: rows + 1].copy_(plan.cu_seqlens_q)
        ours.cu_seqlens_q[rows + 1 :].fill_(tokens)
        self.stride[:tokens].fill_(1)
        if plan.shared is not None:
            self.shared.own[:rows].copy_(plan.shared.own)
            self.shared.parts[:rows].copy_(plan.shared.parts)
            self.shared.token_rows[:tokens].copy_(plan.shared.token_rows)
            self.shared.splits[: len(plan.shared.splits)].copy_(plan.shared.splits)

    def step_back(self) -> None:
        """What :meth:`KernelPlan.advance` undoes, but for ``write``; one token a row."""
        self.plan.positions -= self.stride
        self.plan.lengths -= self.stride
