"""What csrc/plan.cpp lays out, once more and in NumPy: what its layouts are held to."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from w2s_fast.attention.kernel import Bounds
from w2s_fast.attention.row_tree import RowTree
from w2s_fast.cache import Int32Array, Ints, PagePool, as_int32


def only(tree: RowTree, rows: NDArray[np.bool_]) -> RowTree:
    """The tree without sharing for those rows that are False; bool [S]."""
    if rows.all():
        return tree
    found = []
    for first, count, begin, end in zip(tree.first, tree.count, tree.begin, tree.end):
        edges = np.diff(rows[first : first + count], prepend=False, append=False).nonzero()[0]
        found += [(first + a, b - a, begin, end) for a, b in edges.reshape(-1, 2)]
    kept = np.array(found, np.int32).reshape(-1, 4)
    return RowTree(kept[:, 0], kept[:, 1], kept[:, 2], kept[:, 3], np.where(rows, tree.own, 0))


NO_PAGES = np.empty(0, np.int32)


class SplitSegments(NamedTuple):
    """The segments of a tree, cut into splits: what SharedSegments is.

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


def ragged_tables(
    pool: PagePool, slots: Ints, own: Int32Array, splits: Int32Array
) -> tuple[Int32Array, Int32Array]:
    """The tables of rows that share splits int32 [N, 6], each from the first page read by it.

    Returns the entries int32 [P], and int32 [S], where entry 0 of each row would be.
    """
    tables, starts, entries = [NO_PAGES], [], 0
    for row, (table, key) in enumerate(zip(pool.page_table(slots).cpu().numpy(), own)):
        begins = [begin for _, _, begin, _, table_row, _ in splits.tolist() if table_row == row]
        first = min([int(key), *begins]) // pool.page_size
        tables.append(table[table >= 0][first:])
        starts.append(entries - first)
        entries += len(tables[-1])
    return np.concatenate(tables), np.array(starts, np.int32)


def pad(array: NDArray[Any], size: int, spare: int) -> NDArray[Any]:
    return np.concatenate([array, np.full(size - len(array), spare, array.dtype)])


class NumpyPlan(NamedTuple):
    """Fields by name, as KernelPlan and SharedSegments have them, and their bounds."""

    fields: dict[str, NDArray[Any]]
    bounds: Bounds

    @classmethod
    def of(
        cls,
        pool: PagePool,
        slots: Ints,
        counts: Ints,
        tree: RowTree | None,
        ahead: int,
        split_keys: int,
        split_queries: int,
    ) -> NumpyPlan:
        new, old = as_int32(counts), pool.lengths(slots)
        keys = old + new
        start = np.concatenate(([0], new.cumsum())).astype(np.int32)
        tree = RowTree.of([], len(new)) if tree is None else only(tree, new <= split_queries)
        cut = SplitSegments.of(tree, new, split_keys)
        offset = np.arange(start[-1]) - np.repeat(start[:-1], new)
        table, table_start = ragged_tables(pool, slots, cut.own, cut.splits)
        fields = {
            "positions": np.repeat(old, new) + offset,
            "write": pool.places(slots, new).cpu().numpy(),
            "stride": np.ones(start[-1], np.int64),
            "page_table": table,
            "table_start": table_start,
            "lengths": keys,
            "cu_seqlens_q": start,
            "own": cut.own.astype(np.int32),
            "parts": cut.parts,
            "token_rows": cut.token_rows,
            "splits": cut.splits,
        }
        short = new <= split_queries
        return cls(
            fields,
            Bounds(
                rows=len(new),
                tokens=int(start[-1]),
                splits=len(cut.splits),
                pages=len(table),
                max_q=int(new.max(initial=0)),
                max_k=int(keys.max() + ahead) if len(keys) else 0,
                max_own=int((keys - tree.own)[short].max() + ahead) if short.any() else 0,
                max_tokens=int(cut.splits[:, 1].max(initial=0)),
                max_parts=int(cut.parts.max(initial=0)),
            ),
        )

    def padded(self, rows: int, tokens: int, splits: int, pages: int) -> dict[str, NDArray[Any]]:
        """The fields with room for more: spare rows and tokens read nothing and write nowhere.

        Spare entries of page_table are -1 here, and anything in a pass.
        """
        have = self.fields
        room = np.zeros((splits, 6), np.int32)
        room[: self.bounds.splits] = have["splits"]
        return {
            "positions": pad(have["positions"], tokens, 0),
            "write": pad(have["write"], tokens, -1),
            "stride": pad(have["stride"], tokens, 0),
            "page_table": pad(have["page_table"], pages, -1),
            "table_start": pad(have["table_start"], rows, 0),
            "lengths": pad(have["lengths"], rows, 0),
            "cu_seqlens_q": pad(have["cu_seqlens_q"], rows + 1, self.bounds.tokens),
            "own": pad(have["own"], rows, 0),
            "parts": pad(have["parts"], rows, 0),
            "token_rows": pad(have["token_rows"], tokens, 0),
            "splits": room,
        }
