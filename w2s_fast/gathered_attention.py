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

from w2s_fast.attention_blocks import Block, Int64Array, Runs, consecutive, make_block, take_rows
from w2s_fast.dense_attention import LayerOptions, Part, dense_attention, merge, with_sinks
from w2s_fast.pages import Ints, PagePool
from w2s_fast.row_tree import RowTree

__all__ = ["GatheredPlan", "LayerOptions", "dense_attention"]

# Keys and values gathered for one block, in bytes: they should stay in the last-level cache
# between the copy and the product.
_GROUP_BYTES = 32 * 2**20

# Segments of fewer keys are read by each row for itself.
_SHORTEST_SEGMENT = 16

# Keys from which on a shared segment in consecutive pages is a product by itself, without a copy,
# and not copied to be computed with others.
_SHORTEST_VIEW = 64


@dataclass
class GatheredPlan:
    """Passes over a pool: T new tokens of S rows, in blocks of like runs.

    Attributes:
        pool: the pages of the model that runs.
        table: int64 [S, M], the rows' pages.
        write: int64 [T] positions in the pages for the new keys and values.
        positions: int64 [T], each token's position in its sequence.
        own: what each row reads for itself; every token is in one block.
        shared: what rows read together; a token is in one block for each of its segments.
        workspace: [2, n, Hkv, D], keys and values gathered for one block. All blocks and layers
            copy to the same place: memory fresh from the system took three times as long (1,024
            keys of 12 x 64 in float32: 3.4 ms against 1.1 ms on one core).
    """

    pool: PagePool
    table: Tensor
    write: Tensor
    positions: Tensor
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
        new = np.asarray(counts, np.int64)
        old = pool.lengths(slots).astype(np.int64)
        start = np.concatenate(([0], new.cumsum()))
        offset = np.arange(start[-1]) - np.repeat(start[:-1], new)
        pages = pool.page_table(slots).long()
        on_host = pages.cpu().numpy()
        levels, begin = _segments(tree, new, old)
        last = old + new - 1
        rows = Runs(
            start[:-1], new, np.arange(len(new)), begin, last + 1, last + 1 + ahead, old, last
        )
        own = list(_own_blocks(rows, on_host, pool))
        shared = [block for runs in levels for block in _shared_blocks(runs, on_host, pool)]
        most = max(block.gathered for block in (*own, *shared))
        return cls(
            pool=pool,
            table=pages,
            write=pool.slot_mapping(slots, counts),
            positions=torch.from_numpy(np.repeat(old, new) + offset).to(pool.device),
            own=own,
            shared=shared,
            workspace=pool.kv.new_empty(2, most, *pool.kv.shape[-2:]),
        )

    def advance(self) -> None:
        """Move on by one token a row, in place."""
        self.positions += 1
        size = self.pool.page_size
        page = self.table.gather(1, (self.positions // size)[:, None])[:, 0]
        self.write.copy_(page * size + self.positions % size)
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
        if len(parts) > 1 or not isinstance(self.own[0].tokens, slice):
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


def _segments(
    tree: RowTree | None, new: Int64Array, old: Int64Array
) -> tuple[list[Runs], Int64Array]:
    """The runs of every level of segments, from the root on, and where a row's own keys begin."""
    own, level = np.zeros(len(new), np.int64), np.zeros(len(new), np.int64)
    start = new.cumsum() - new
    found: list[list[list[int]]] = []
    if tree is not None:
        columns = (tree.first, tree.count, tree.end)
        for first, count, end in zip(*(column.tolist() for column in columns)):
            rows = slice(first, first + count)
            begin = int(own[first])
            if end - begin < _SHORTEST_SEGMENT:
                continue  # the keys stay with the segments below, and in the end with the rows
            tokens = int(new[rows].sum())
            low, high = int(old[rows].min()), int((old + new)[rows].max()) - 1
            if level[first] == len(found):
                found.append([])
            found[level[first]].append(
                [int(start[first]), tokens, first, begin, end, end, low, high]
            )
            own[rows] = end
            level[rows] += 1
    return [Runs(*np.array(runs, np.int64).T) for runs in found], own


def _own_blocks(runs: Runs, table: Int64Array, pool: PagePool) -> Iterator[Block]:
    for group in _alike(runs, pool):
        yield make_block(runs[group], table, pool, own=True)


def _shared_blocks(runs: Runs, table: Int64Array, pool: PagePool) -> Iterator[Block]:
    alone = np.array(
        [
            end - begin >= _SHORTEST_VIEW and consecutive(table[row], begin, end, pool.page_size)
            for row, begin, end in zip(runs.row, runs.begin, runs.end)
        ]
    )
    for i in alone.nonzero()[0]:
        yield make_block(runs[i : i + 1], table, pool, own=False)
    others = runs[~alone]
    for group in _alike(others, pool):
        yield make_block(others[group], table, pool, own=False)


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
