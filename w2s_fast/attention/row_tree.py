"""RowTree: which rows of a forward pass share which of their first tokens.

The rows of a search are a tree: all rows of a request share its prompt, siblings share their
parent's whole history, and only the last few tokens are a row's own. Attention that knows this
reads shared keys once. The idea of cutting a tree of sequences into segments is DeFT's
(arXiv 2404.00242) and FastTree's; here the search itself knows the tree, so nothing is looked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from w2s_fast._pages import cut_levels
from w2s_fast.cache import Int32Array, Ints, as_int32


class Level(NamedTuple):
    """One level of sharing: rows of the same group hold the same tokens up to ``ends``.

    Attributes:
        groups: S numbers. Neighbours of one number are a group; negative: the row shares nothing.
        ends: S numbers, how many of its first tokens a row shares; the same within a group.
    """

    groups: Ints
    ends: Ints


@dataclass(frozen=True)
class RowTree:
    """Shared segments of S rows: runs of positions whose keys neighbouring rows have in common.

    The segments of a row, in their order, cover its positions 0 : own without gaps; the rest is
    the row's own. Rows of a segment hold the same keys there, though maybe in different pages: a
    partial page is copied when a sequence is forked. The first row's pages serve all of them.

    Attributes:
        first, count: int32 [N], rows first : first + count. begin, end: int32 [N], positions.
            A segment comes after those that the same rows share before it.
        own: int32 [S], where a row's own keys begin; at most its tokens before the pass.
    """

    first: Int32Array
    count: Int32Array
    begin: Int32Array
    end: Int32Array
    own: Int32Array

    @classmethod
    def of(cls, levels: Sequence[Level], rows: int) -> RowTree:
        """The tree of levels from the root on; each divides the groups of the one before.

        What a level adds is left out, and stays with the level below, if it is shorter than
        SHORTEST_SEGMENT of csrc/row_tree.h. A single row may be a group: its sums are cut as among
        siblings.
        """
        return cls(*cut_levels([(as_int32(g), as_int32(e)) for g, e in levels], rows))

    def of_rows(self, begin: int, end: int) -> RowTree:
        """The tree of rows ``begin`` : ``end`` alone."""
        first = np.maximum(self.first, begin)
        count = np.minimum(self.first + self.count, end) - first
        some = count > 0
        return RowTree(
            (first - begin)[some].astype(np.int32),
            count[some].astype(np.int32),
            self.begin[some],
            self.end[some],
            self.own[begin:end],
        )

    @property
    def shares(self) -> bool:
        """Whether there is any segment."""
        return len(self.first) > 0

    def keys_read(self, lengths: Ints) -> int:
        """Keys that one pass reads if every segment is read once; ``lengths`` with new tokens."""
        own = np.asarray(lengths, np.int64) - self.own
        return int((self.end - self.begin).sum(dtype=np.int64) + own.sum())

    def pages_read(self, page_table: Int32Array, lengths: Ints, page_size: int) -> int:
        """Different pages that one pass reads: int32 [S, M] page_table, [S] ``lengths``."""
        rows = np.concatenate([self.first, np.arange(len(self.own))])
        begin = np.concatenate([self.begin, self.own])[:, None]
        end = np.concatenate([self.end, np.asarray(lengths)])[:, None]
        start = np.arange(page_table.shape[1]) * page_size
        touched = (start < end) & (start + page_size > begin)
        return len(np.unique(page_table[rows][touched]))
