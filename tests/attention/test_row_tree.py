"""What the search says its rows share is so, and is all there is to share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.attention_reads import search as search_reads
from tests.support.contents import contents
from tests.support.engines import LONG_PROMPTS, MIXED, make_engine
from tests.support.tiny_models import tiny_triple
from w2s_fast import SearchParams
from w2s_fast._pages import SHORTEST_SEGMENT
from w2s_fast.attention.row_tree import Level, RowTree
from w2s_fast.decoding.decoding import Decoding
from w2s_fast.models.model import PagedModel

S = SHORTEST_SEGMENT


def segments(tree: RowTree) -> list[tuple[int, int, int, int]]:
    return list(zip(*(c.tolist() for c in (tree.first, tree.count, tree.begin, tree.end))))


def test_a_prompt_and_histories_are_segments() -> None:
    tree = RowTree.of(
        [
            Level([0, 0, 0, 0, 1, 2], [40, 40, 40, 40, 50, 3]),
            Level([0, 0, 1, 1, 2, 3], [60, 60, 60, 60, 80, 30]),
        ],
        6,
    )
    assert segments(tree) == [
        (0, 4, 0, 40),
        (4, 1, 0, 50),
        (0, 2, 40, 60),
        (2, 2, 40, 60),
        (4, 1, 50, 80),
        (5, 1, 0, 30),  # 3 tokens are no segment: they stay with the level below
    ]
    assert tree.own.tolist() == [60, 60, 60, 60, 80, 30]
    assert tree.shares
    assert tree.keys_read([61, 62, 63, 64, 81, 31]) == 40 + 50 + 20 + 20 + 30 + 30 + 12


def test_short_and_unshared_pieces_stay_with_their_rows() -> None:
    tree = RowTree.of([Level([0, 0, -1], [S - 1, S - 1, 500]), Level([0, 1, 2], [S, S - 1, 7])], 3)
    assert segments(tree) == [(0, 1, 0, S)]
    assert tree.own.tolist() == [S, 0, 0]
    assert not RowTree.of([Level([0, 0], [S - 1, S - 1])], 2).shares
    empty = RowTree.of([Level([], [])], 0)
    assert not empty.shares and empty.keys_read([]) == 0


@given(
    levels=st.lists(st.lists(st.integers(0, 30), min_size=7, max_size=7), max_size=3),
    begin=st.integers(0, 7),
    count=st.integers(0, 7),
)
def test_rows_by_themselves_have_the_tree_of_their_levels(
    levels: list[list[int]], begin: int, count: int
) -> None:
    groups = ([0, 0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2, 3], [0, 1, 2, 3, 4, 5, 6])
    built, reached = [], np.zeros(7, int)
    for own, more in zip(groups, levels):
        # The same within a group: what its first row has.
        reached = reached + np.array(more)[np.searchsorted(own, own)]
        built.append(Level(own, reached))
    end = min(begin + count, 7)
    some = RowTree.of([Level(g[begin:end], e[begin:end]) for g, e in built], end - begin)
    found = RowTree.of(built, 7).of_rows(begin, end)
    assert segments(found) == segments(some)
    assert found.own.tolist() == some.own.tolist()
    assert {column.dtype for column in vars(found).values()} == {np.dtype(np.int32)}


@given(
    levels=st.lists(
        st.lists(st.tuples(st.integers(1, 3), st.integers(0, 40)), min_size=1, max_size=3),
        max_size=3,
    )
)
def test_a_row_is_covered_without_gaps(levels: list[list[tuple[int, int]]]) -> None:
    """Levels from the root on: each group is divided into groups of some size and more tokens."""
    sizes = [1]
    for level in levels:
        sizes = [s for whole in sizes for s, _ in level for _ in range(whole)]
    rows = sum(sizes)
    built: list[Level] = []
    ends = np.zeros(rows, int)
    groups = np.zeros(rows, int)
    rng = np.random.default_rng(rows)
    for level in levels:
        more = rng.integers(0, 40, rows)
        groups = groups * 3 + np.sort(rng.integers(0, 3, rows))
        _, first = np.unique(groups, return_index=True)
        names = np.searchsorted(np.sort(first), np.arange(rows), side="right") - 1
        ends = ends + more[np.sort(first)][names]
        built.append(Level(names, ends))
        del level
        groups = names
    tree = RowTree.of(built, rows)
    reached = np.zeros(rows, int)
    for first_row, count, begin, end in segments(tree):
        assert end - begin >= S
        assert (reached[first_row : first_row + count] == begin).all()
        reached[first_row : first_row + count] = end
    assert (reached == tree.own).all()


# In a search


@contextmanager
def passes(check: Any) -> Iterator[None]:
    """Calls check(model, slots, tree, tokens before the pass) at each pass with a tree."""
    forward, step, begin = PagedModel.forward, Decoding.step, Decoding.__init__

    def checked_forward(
        self: Any, slots: Any, tokens: Any, counts: Any, tree: Any = None, *more: Any
    ) -> Any:
        before = self.pool.lengths(slots)
        out = forward(self, slots, tokens, counts, tree, *more)
        if tree is not None:
            check(self, np.asarray(slots), tree, before, np.asarray(counts))
        return out

    def checked_begin(self: Any, model: Any, slots: Any, steps: int, tree: Any = None) -> None:
        begin(self, model, slots, steps, tree)
        self.asked = (model, np.asarray(slots), tree)

    def checked_step(self: Any, tokens: Any) -> Any:
        model, slots, tree = self.asked
        before = model.pool.lengths(slots)
        out = step(self, tokens)
        assert tree is not None
        check(model, slots, tree, before, np.ones(len(slots), int))
        return out

    with (
        mock.patch.object(PagedModel, "forward", checked_forward),
        mock.patch.object(Decoding, "__init__", checked_begin),
        mock.patch.object(Decoding, "step", checked_step),
    ):
        yield


def test_rows_of_a_segment_hold_the_same_keys_and_values() -> None:
    counted = {"segments": 0, "deep": 0, "shared": 0, "guide": 0}

    def check(model: Any, slots: Any, tree: RowTree, before: Any, counts: Any) -> None:
        assert (tree.own <= before).all() and len(tree.own) == len(slots)
        for first, count, begin, end in segments(tree):
            counted["segments"] += 1
            counted["deep"] += begin > 0
            counted["shared"] += count > 1
            counted["guide"] += model.name != "base"
            held = [contents(model, s, end)[:, :, begin:] for s in slots[first : first + count]]
            assert all(torch.equal(held[0], other) for other in held[1:])

    engine = make_engine(*tiny_triple(eos=(0, 6, 13)))
    wide = SearchParams(
        beam_width=3, successors=3, chunk_length=20, max_new_tokens=60, seed=5, ignore_eos=True
    )
    with passes(check):
        engine.generate([*LONG_PROMPTS, LONG_PROMPTS[0]], [*MIXED, wide])
    assert all(counted.values()), counted


@pytest.mark.parametrize("prompt", [512, 4096])
def test_a_search_reads_little_more_than_it_must(prompt: int) -> None:
    """P + W h + W K l keys a step: once the prompt, once a history, and each row's own tokens."""
    reads = search_reads(prompt, new_tokens=50)
    assert reads.steps == 40
    assert reads.flat_keys > 12 * reads.ideal_keys
    assert reads.worst_pages <= 1.05
    assert reads.keys <= 1.05 * reads.ideal_keys
