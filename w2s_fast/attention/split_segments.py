"""The segments of a tree of rows, cut into splits: work for one program of paged_attention each."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from w2s_fast.attention.row_tree import RowTree
from w2s_fast.cache import Int32Array


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
