"""A pass laid out in C++ is what NumPy makes of it; its splits cover what rows share, in order."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.attention.numpy_plan import NumpyPlan, SplitSegments, only
from tests.kernels.forests import Forest, Request, make_forest
from tests.support.drawn import drawn
from w2s_fast._pages import SHORTEST_SEGMENT, PassLayout
from w2s_fast.attention.kernel import Bounds, KernelPlan, PassFields
from w2s_fast.attention.row_tree import Level, RowTree
from w2s_fast.attention.staging import Field
from w2s_fast.cache import PagePool
from w2s_fast.errors import PageMisuse
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


NONE = np.empty(0, np.int32)


def lay_out(
    forest: Forest,
    tree: RowTree | None,
    split_keys: int,
    split_queries: int = SPLIT_QUERIES,
    ahead: int = 0,
) -> PassLayout:
    segments = (NONE,) * 5
    if tree is not None:
        segments = (tree.first, tree.count, tree.begin, tree.end, tree.own)
    return PassLayout(
        forest.pool.manager,
        forest.slots,
        forest.counts,
        *segments,
        split_keys,
        split_queries,
        ahead,
    )


def written(
    layout: PassLayout, more: tuple[int, int, int, int] = (0, 0, 0, 0), back: bool = False
) -> dict[str, Any]:
    """What it writes into a buffer full of something else, with room for some ``more``.

    Entries of page_table that it leaves alone are -1.
    """
    room = [have + spare for have, spare in zip(layout.bounds, more)]
    made = PassFields(*room, shares=True, spare=True, more={"last": Field(torch.int64, (3,))})
    buffer = torch.full((made.fields.nbytes,), 77, dtype=torch.uint8)
    made.write(layout, buffer.numpy(), back)
    fields = {name: view.numpy() for name, view in made.fields.tensors(buffer).items()}
    assert (fields.pop("last") == 0x4D4D4D4D4D4D4D4D).all()  # not ours to write
    spare = fields["page_table"][layout.bounds[3] :]
    assert (spare == 0x4D4D4D4D).all()
    spare[:] = -1
    return fields


@drawn(150)
@given(
    requests=st.lists(requests, min_size=1, max_size=3),
    page_size=st.sampled_from([1, 3, 16, 48]),
    aborted=st.sampled_from([0.0, 0.5]),
    shares=st.sampled_from([True, True, False]),
    split_keys=st.sampled_from([16, 32, 512]),
    split_queries=st.sampled_from([0, 3, 16]),
    ahead=st.sampled_from([0, 4]),
    more=st.tuples(*[st.integers(0, 4)] * 4),
    seed=st.integers(0, 2**16),
)
def test_a_layout_is_what_numpy_makes_of_a_pass(
    requests: list[Request],
    page_size: int,
    aborted: float,
    shares: bool,
    split_keys: int,
    split_queries: int,
    ahead: int,
    more: tuple[int, int, int, int],
    seed: int,
) -> None:
    forest = make_forest(requests, 1, 1, 1, page_size, aborted=aborted, seed=seed)
    tree = forest.tree() if shares else None
    layout = lay_out(forest, tree, split_keys, split_queries, ahead)
    plan = NumpyPlan.of(
        forest.pool, forest.slots, forest.counts, tree, ahead, split_keys, split_queries
    )
    assert Bounds.of(layout) == plan.bounds
    expected = plan.padded(*(have + spare for have, spare in zip(plan.bounds, more)))
    found = written(layout, more)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert np.array_equal(found[name], array), name
    # One token behind, and nothing else is different.
    behind = written(layout, more, back=True)
    rows, tokens = plan.bounds[:2]
    expected["positions"][:tokens] -= 1
    expected["lengths"][:rows] -= 1
    assert all(np.array_equal(behind[name], array) for name, array in expected.items())


def test_a_pass_without_rows_is_all_spare() -> None:
    pool = PagePool(1, 1, 1, 4, 16, 4, 64, torch.float32, "cpu")
    layout = PassLayout(pool.manager, *(NONE,) * 7, SPLIT_KEYS, SPLIT_QUERIES)
    assert set(layout.bounds) == {0}
    found = written(layout, (3, 5, 2, 4))
    assert (found["write"] == -1).all() and (found["page_table"] == -1).all()
    others = (array for name, array in found.items() if name not in ("write", "page_table"))
    assert not any(array.any() for array in others)


def test_slots_may_change_before_it_is_written_but_no_page_may_be_somebody_elses() -> None:
    """A long history is named by runs of its pages, and found where they are written down."""
    pool = PagePool(1, 1, 1, 300, 2, 8, 256, torch.float32, "cpu")

    def grown(tokens: int) -> Any:
        slots = pool.allocate(1)
        pool.reserve(slots, [tokens])
        pool.extend(slots, [tokens - 1])
        return slots

    one = np.ones(1, np.int32)
    slots = grown(200)
    own = pool.manager.page_table(slots)[0].tolist()
    layout = PassLayout(pool.manager, slots, one, *(NONE,) * 5, SPLIT_KEYS, SPLIT_QUERIES)
    pool.extend(slots, one)
    child = pool.fork(slots, [1])
    pool.release(slots)
    pool.reserve(child, [20])
    room = (1, 1, 0, 100)
    assert written(layout, room)["page_table"].tolist()[: len(own)] == own
    pool.release(child)
    others = [grown(200) for _ in range(3)]
    pool.manager.page_table(np.concatenate(others))  # their runs are written down
    with pytest.raises(PageMisuse, match="after its pages went"):
        written(layout, room)


def test_what_makes_no_sense_is_refused() -> None:
    forest = make_forest([Request(40, ((2, 10, 10),))], 1, 1, 1)
    good = forest.tree()

    def of(**columns: list[int]) -> RowTree:
        return replace(good, **{k: np.array(v, np.int32) for k, v in columns.items()})

    lay_out(forest, good, 16)
    for tree in (
        of(first=[-1]),
        of(first=[1]),
        of(count=[0]),
        of(count=[3]),
        of(count=[2, 2]),
        of(begin=[1]),
        of(end=[0]),
        of(end=[51], own=[51, 51]),
        of(own=[40]),
        of(own=[40, 41]),
    ):
        with pytest.raises(PageMisuse, match="not a tree of these rows"):
            lay_out(forest, tree, 16)
    with pytest.raises(PageMisuse, match="at least one key"):
        lay_out(forest, good, 0)
    for slots, counts in (([0, 0], [1, 1]), ([0, 99], [1, 1]), ([1, 2], [1]), ([1], [-1])):
        with pytest.raises(PageMisuse):
            PassLayout(
                forest.pool.manager,
                *(np.array(numbers, np.int32) for numbers in (slots, counts)),
                *(NONE,) * 5,
                16,
                16,
            )


def test_a_layout_does_not_leave_its_buffer() -> None:
    forest = make_forest([Request(40, ((2, 10, 10),))], 1, 1, 1)
    layout = lay_out(forest, forest.tree(), 16)
    shape = layout.bounds[:4]
    made = PassFields(*shape, shares=True, spare=True)
    buffer = np.zeros(made.fields.nbytes + 8, np.uint8)
    made.write(layout, buffer)
    before = buffer.copy()
    for smaller in range(4):
        room = [have - (i == smaller) for i, have in enumerate(shape)]
        with pytest.raises(PageMisuse, match="does not fit"):
            layout.write(buffer, made._offsets, *room)
    with pytest.raises(PageMisuse, match="ends behind its buffer"):
        layout.write(buffer[: made.fields.nbytes - 16], made._offsets, *shape)
    with pytest.raises(PageMisuse, match="ends behind its buffer"):
        layout.write(buffer, made._offsets + 2**62, *shape)
    with pytest.raises(PageMisuse, match="odd address"):
        layout.write(buffer, made._offsets + 1, *shape)
    with pytest.raises(PageMisuse, match="11 fields"):
        layout.write(buffer, made._offsets[1:], *shape)
    with pytest.raises(TypeError):
        layout.write(buffer.astype(np.float32), made._offsets, *shape)
    assert np.array_equal(buffer, before)


def test_a_layout_depends_on_nothing_that_happens_later() -> None:
    forest = make_forest([Request(40, ((2, 10, 10), (2, 3, 9)))], 1, 1, 1)
    layout = lay_out(forest, forest.tree(), 16)
    before = written(layout)
    pool, slots = forest.pool, forest.slots
    pool.extend(slots, forest.counts)
    pool.reserve(slots, [16] * len(slots))
    assert all(np.array_equal(array, before[name]) for name, array in written(layout).items())
    children = pool.fork(slots[:1], [2])
    pool.release(slots)
    pool.reserve(children, [16, 16])  # pages that were the rows'
    assert all(np.array_equal(array, before[name]) for name, array in written(layout).items())
    del forest, pool
    gc.collect()
    assert all(np.array_equal(array, before[name]) for name, array in written(layout).items())


def entries_of(forest: Forest) -> int:
    return Bounds.of(lay_out(forest, forest.tree(), SPLIT_KEYS)).pages


@pytest.mark.parametrize("new", [1, 5])
def test_what_is_copied_of_a_history_is_an_entry_a_page_and_not_one_a_row(new: int) -> None:
    """16 rows of one request, whose tails fill the pages that they always have."""
    size, more = 16, 40

    def request(prompt: int, history: int) -> Forest:
        levels = ((4, history, history), (4, 0, 0))
        return make_forest([Request(prompt, levels, (new, new))], 1, 1, 1, size)

    short = entries_of(request(10 * size, 10 * size))
    assert short == 10 + 4 * 10 + 16
    assert entries_of(request((10 + more) * size, 10 * size)) == short + more
    assert entries_of(request(10 * size, (10 + more) * size)) == short + 4 * more
    # Rows of a page that is partly shared have it twice: where it is read, and where it goes on.
    assert entries_of(request(10 * size + 3, 10 * size + 2)) == 10 + 4 * 11 + 12


def test_rows_that_share_nothing_have_their_whole_tables() -> None:
    forest = make_forest([Request(40, ((3, 10, 10),))], 1, 1, 1)
    bounds = Bounds.of(lay_out(forest, None, SPLIT_KEYS))
    assert bounds.pages == int(forest.pool.manager.held_pages[forest.slots].sum()) == 3 * 4


@drawn(60)
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
    layout = lay_out(forest, tree, split_keys, split_queries=1000)
    found = SplitSegments(**{name: written(layout)[name] for name in SplitSegments._fields})
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


def test_a_bound_of_own_keys_is_one_of_rows_that_may_be_cut() -> None:
    """A prompt's keys are not cut, however many there are: no program is launched for it."""
    long = (SPLIT_QUERIES + 1, SPLIT_QUERIES + 1)
    alone = make_forest([Request(3 * SPLIT_KEYS, new=long)]).plan()
    assert alone.max_own == 0 and alone.max_k == 3 * SPLIT_KEYS + SPLIT_QUERIES + 1
    beside = make_forest([Request(3 * SPLIT_KEYS, new=long), Request(70, new=(2, 2))])
    assert beside.plan(shared=False).max_own == 72
    assert beside.plan().max_own == 2


# The reference


def segments(tree: RowTree) -> list[tuple[int, int, int, int]]:
    return list(zip(*(c.tolist() for c in (tree.first, tree.count, tree.begin, tree.end))))


def test_rows_can_be_taken_out() -> None:
    tree = RowTree.of([Level([0] * 5, [40] * 5), Level([0, 0, 1, 1, 1], [60] * 5)], 5)
    assert only(tree, np.ones(5, bool)) is tree
    some = only(tree, np.array([True, False, False, True, True]))
    assert segments(some) == [(0, 1, 0, 40), (3, 2, 0, 40), (0, 1, 40, 60), (3, 2, 40, 60)]
    assert some.own.tolist() == [60, 0, 0, 60, 60]
    assert not only(tree, np.zeros(5, bool)).shares
