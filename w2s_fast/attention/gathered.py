"""Attention over pages in plain torch: dense products over runs of keys that rows have in common.

The CPU's path, and that of any device without the kernels. The keys of a row are cut as the tree
of rows says. Every shared segment is one product of all its rows' queries with one copy of its
keys, in place where its pages follow one another; what is left of a row is its own. Log-sum-exps
put the parts of a row together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from w2s_fast.attention.blocks import Block, Int64Array, Runs, make_block, take_rows
from w2s_fast.attention.contract import LayerOptions
from w2s_fast.attention.dense import Part, merge, with_sinks
from w2s_fast.attention.placement import Placement, Spans
from w2s_fast.attention.row_tree import RowTree
from w2s_fast.cache import Ints, PagePool

# Keys and values of one block, in bytes: they should stay in a cache between their copy and the
# product. "flat" of bench.cpu_attention on one core with an L2 cache of 2 MiB, prompt 256, 1 and 4
# requests: blocks of 8 MiB took 0.58 to 0.68 of the time of blocks of 32 MiB, of 4 MiB 0.63 to
# 0.69, of 16 MiB 0.64 to 0.88.
_GROUP_BYTES = 8 * 2**20


@dataclass(kw_only=True)
class GatheredPlan(Placement):
    """Passes over a pool, in blocks of like runs.

    Attributes:
        own: what each row reads for itself; every token is in one block.
        shared: what rows read together; a token is in one block for each of its segments.
        workspace: [2, n, Hkv, D], keys and values gathered for one block. All blocks and layers
            copy to the same place: memory fresh from the system took three times as long (1,024
            keys of 12 x 64 in float32: 3.4 ms against 1.1 ms on one core).
    """

    own: list[Block]
    shared: list[Block]
    workspace: Tensor

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
        spans = Spans.of(pool, slots, counts)
        placed = Placement.at(pool, slots, spans)
        old, new, start = (numbers.astype(np.int64) for numbers in spans)
        pages = placed.page_table.cpu().numpy().astype(np.int64)
        last = old + new - 1
        begin = np.zeros_like(old) if tree is None else tree.own.astype(np.int64)
        rows = Runs(
            start[:-1], new, np.arange(len(new)), begin, last + 1, last + 1 + ahead, old, last
        )
        levels = [] if tree is None else _segments(tree, new, old)
        own = _blocks(rows, pages, pool, own=True)
        shared = [block for runs in levels for block in _blocks(runs, pages, pool, own=False)]
        most = max(block.gathered for block in (*own, *shared))
        return cls(
            **vars(placed),
            own=own,
            shared=shared,
            workspace=pool.kv.new_empty(2, most, *pool.kv.shape[-2:]),
        )

    def advance(self) -> None:
        """Move on by a token a row, in place."""
        super().advance()
        for block in (*self.own, *self.shared):
            block.advance()

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: LayerOptions,
    ) -> Tensor:
        """Write the new keys and values, then attend over all of each row's keys."""
        kv = self.pool.kv[layer].flatten(1, 2)  # [2, pages * page_size, Hkv, D]
        kv[0].index_copy_(0, self.write, key.to(kv.dtype))
        kv[1].index_copy_(0, self.write, value.to(kv.dtype))
        parts = [
            block.attend(query, kv, self.positions, options, self.workspace) for block in self.own
        ]
        whole = parts[0]
        if len(parts) > 1:  # the only one has all tokens, in order
            whole = Part(torch.empty_like(query), whole.lse.new_empty(query.shape[:2]))
            for block, part in zip(self.own, parts):
                _put(whole, block.tokens, part)
        if self.shared:
            whole = Part(whole.out.to(whole.lse.dtype), whole.lse)
        for block in self.shared:
            if block.beyond(options.window) >= block.length:
                continue
            part = block.attend(query, kv, self.positions, options, self.workspace)
            of_tokens = Part(take_rows(whole.out, block.tokens), take_rows(whole.lse, block.tokens))
            merge(of_tokens, part)
            if not isinstance(block.tokens, slice):  # else they are views
                _put(whole, block.tokens, of_tokens)
        return with_sinks(whole, options).to(query.dtype)


def _put(whole: Part, rows: Tensor | slice, part: Part) -> None:
    for target, source in zip(whole, part):
        if isinstance(rows, slice):
            target[rows] = source
        else:
            target.index_copy_(0, rows, source)


def _segments(tree: RowTree, new: Int64Array, old: Int64Array) -> list[Runs]:
    """The segments of every level, from the root on: a token is in at most one of each level.

    Segments as short as row_tree's ``SHORTEST_SEGMENT`` pay here, too: without those of 16 / 32 /
    64 keys a step of decoding 16 rows took 1.36 / 1.97 / 2.6 times as long, an append of 5 tokens
    0.98 / 1.28 / 1.8 times (python -m bench.cpu_attention --history 0 --prompts 16 32 64, "flat"
    to "tree", one core).
    """
    start = np.concatenate(([0], new.cumsum()))
    first, count, begin, end = (
        column.astype(np.int64) for column in (tree.first, tree.count, tree.begin, tree.end)
    )
    last = first + count
    # Of the rows of each segment; what comes between two segments is left out.
    edges = np.stack([first, last], 1).ravel()
    low = np.minimum.reduceat(np.append(old, 0), edges)[::2] if len(first) else old[:0]
    high = np.maximum.reduceat(np.append(old + new, 0), edges)[::2] - 1 if len(first) else old[:0]
    whole = Runs(start[first], start[last] - start[first], first, begin, end, end, low, high)
    levels, left = [], np.ones(len(first), bool)
    reached = np.zeros(len(new), np.int64)  # to where segments cover each row so far
    while left.any():
        own = np.flatnonzero(left & (begin == reached[first]))
        levels.append(whole[own])
        left[own] = False
        rows = np.repeat(last[own] - count[own].cumsum(), count[own]) + np.arange(count[own].sum())
        reached[rows] = np.repeat(end[own], count[own])
    return levels


def _blocks(runs: Runs, table: Int64Array, pool: PagePool, own: bool) -> list[Block]:
    return [make_block(runs[group], table, pool, own) for group in _alike(runs, pool)]


def _alike(runs: Runs, pool: PagePool) -> Iterator[Int64Array]:
    """Cut runs into groups of like shapes, so that padding stays small: their indices."""
    room = _GROUP_BYTES * pool.kv.shape[0] // pool.bytes_per_token  # keys of one layer
    count, length = runs.count, runs.end - runs.begin
    order = np.lexsort((length, count))
    while len(order):
        c, n = count[order], length[order]
        least, most = np.minimum.accumulate(n), np.maximum.accumulate(n)
        fits = (c <= 2 * c[0]) & ((c[0] > 1) | (c == 1))
        fits &= (most <= 2 * least + 64) & (most * np.arange(1, len(n) + 1) <= room)
        fits[0] = True
        size = len(fits) if fits.all() else int(fits.argmin())
        yield np.sort(order[:size])
        order = order[size:]
