"""Segments of a tree are cut into splits that cover exactly what rows share, in order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.forests import Forest, Request, make_forest
from w2s_fast.attention.kernel import KernelPlan, SplitSegments
from w2s_fast.attention.row_tree import SHORTEST_SEGMENT, RowTree
from w2s_fast.kernels.paged_attention_triton import SPLIT_KEYS, SPLIT_QUERIES

requests = st.builds(
    Request,
    prompt=st.integers(1, 90),
    levels=st.lists(
        st.tuples(st.integers(1, 3), st.integers(0, 20), st.integers(20, 40)), max_size=3
    ).map(tuple),
    new=st.sampled_from([(1, 1), (1, 4), (14, 19)]),
    shares=st.sampled_from([True, True, False]),
)


@settings(max_examples=60)
@given(
    requests=st.lists(requests, min_size=1, max_size=3),
    aborted=st.sampled_from([0.0, 0.5]),
    split_keys=st.sampled_from([16, 32, 512]),
    seed=st.integers(0, 2**16),
)
def test_the_splits_of_a_row_are_its_shared_keys_in_order(
    requests: list[Request], aborted: float, split_keys: int, seed: int
) -> None:
    forest = make_forest(requests, 1, 1, 1, aborted=aborted, seed=seed)
    tree, new = forest.tree(), forest.counts
    found = SplitSegments.of(tree, new, split_keys)
    start = np.concatenate(([0], new.cumsum()))
    assert found.token_rows.tolist() == [row for row, n in enumerate(new) for _ in range(n)]
    covered: list[dict[int, tuple[int, int]]] = [{} for _ in new]
    for first_token, tokens, begin, end, table_row, part in found.splits.tolist():
        assert 0 < end - begin <= split_keys
        rows = np.unique(found.token_rows[first_token : first_token + tokens])
        assert table_row == rows[0]
        assert first_token == start[rows[0]] and first_token + tokens == start[rows[-1] + 1]
        assert len(set(forest.request[rows])) == 1
        for row in rows:
            assert part not in covered[row]
            covered[row][part] = (begin, end)
    for row, parts in enumerate(covered):
        assert sorted(parts) == list(range(found.parts[row]))
        borders = [0] + [border for part in sorted(parts) for border in parts[part]]
        assert borders[1::2] == borders[0:-1:2] and borders[-1] == found.own[row]
    sizes = found.splits[:, 3] - found.splits[:, 2]
    assert (np.diff(sizes) <= 0).all()


def shared_rows(forest: Forest) -> list[bool]:
    plan = forest.plan()
    return [False] * len(forest.slots) if plan.shared is None else (plan.shared.own > 0).tolist()


def test_a_plan_shares_exactly_where_it_pays() -> None:
    siblings = ((2, 0, 0), (2, 1, 9))
    few, many = (SPLIT_QUERIES, SPLIT_QUERIES), (SPLIT_QUERIES + 1, SPLIT_QUERIES + 1)
    assert shared_rows(make_forest([Request(40, siblings, few)])) == [True] * 4
    assert shared_rows(make_forest([Request(40, siblings, many)])) == [False] * 4
    both = [
        Request(40, siblings, few),
        Request(40, siblings, many),
        Request(SHORTEST_SEGMENT - 1, siblings, few),
    ]
    assert shared_rows(make_forest(both)) == [True] * 4 + [False] * 8
    assert make_forest([Request(SHORTEST_SEGMENT - 1, siblings, few)]).plan().shared is None
    assert make_forest([Request(40, siblings, few)]).plan(shared=False).shared is None


def test_a_plans_bounds_hold_for_all_steps() -> None:
    forest = make_forest([Request(SPLIT_KEYS + 80, ((3, 20, 20), (2, 5, 5))), Request(70)])
    tree = forest.tree()
    forest.pool.reserve(forest.slots, [4] * len(forest.slots))
    plan = KernelPlan.make(forest.pool, forest.slots, forest.counts, tree, ahead=3)
    assert plan.shared is not None and plan.max_k == SPLIT_KEYS + 80 + 20 + 5 + 1 + 3
    assert plan.shared.max_tokens == 6 and plan.shared.max_parts == 3
    assert plan.shared.own.tolist() == [SPLIT_KEYS + 100] * 6 + [70]
    assert plan.shared.max_own == 5 + 1 + 3
    assert all(t.dtype == torch.int32 for t in plan.shared[:4])


@pytest.mark.parametrize("rows", [1, 5])
def test_a_plan_without_a_tree_is_one_of_rows_that_share_nothing(rows: int) -> None:
    forest = make_forest([Request(40, ((rows, 0, 0),))])
    nothing = RowTree.of([], rows)
    plan = KernelPlan.make(forest.pool, forest.slots, forest.counts, nothing)
    assert plan.shared is None
    assert plan.lengths.tolist() == [41] * rows and plan.positions.tolist() == [40] * rows
