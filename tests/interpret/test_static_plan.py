"""A plan that took over another gives its rows the same bits, whatever it held before.

The operators' paths on the CPU do not look at shared segments; these kernels do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.interpret.attention import launched, trees
from tests.interpret.rule import DEVICE
from tests.kernels.forests import Forest, Request, attend, make_forest
from tests.support.drawn import drawn
from w2s_fast._pages import PassLayout
from w2s_fast.attention.contract import LayerOptions
from w2s_fast.attention.kernel import Bounds, KernelPlan, lay_out
from w2s_fast.attention.staging import Room
from w2s_fast.attention.static_plan import Bucket, StaticPlan


def loaded(
    forest: Forest, room: Room, layout: PassLayout, padded: tuple[int, int], back: bool = False
) -> StaticPlan:
    """The plan of a bucket, in memory in which any plan may have been before."""
    most = forest.pool.max_tokens_per_slot // forest.pool.page_size
    bucket = Bucket.of(Bounds.of(layout), *padded, most)
    static = StaticPlan.cut(bucket, forest.pool, room)
    static.buffer.copy_(torch.randint(0, 256, static.buffer.shape, dtype=torch.uint8))
    static.load(layout, back=back)
    return static


def rows_of(forest: Forest, draw: Callable[..., Any]) -> np.ndarray[Any, Any]:
    rows = range(len(forest.slots))
    kept = st.lists(st.sampled_from(rows), min_size=1, max_size=8, unique=True)
    return np.array(draw(kept.map(sorted)))


@drawn(12)
@given(data=st.data(), requests=trees(), shared=st.sampled_from([True, True, False]))
def test_attention_is_that_of_the_plan_itself(
    data: st.DataObject, requests: list[Request], shared: bool
) -> None:
    forest = make_forest(requests, device=DEVICE)
    with launched():
        rows = rows_of(forest, data.draw)
        plan, queries = forest.plan(rows, shared), forest.queries_of(rows)
        expected = attend(forest, plan, queries, scale=0.25)
        tree = forest.tree(rows) if shared else None
        layout = lay_out(forest.pool, forest.slots[rows], forest.counts[rows], tree)
        more = data.draw(st.tuples(st.integers(0, 2), st.integers(0, 5)))
        padded = (len(rows) + more[0], len(queries) + more[1])
        static = loaded(forest, Room(forest.pool.device), layout, padded)
        padding = torch.full((padded[1] - len(queries), 4, 16), torch.nan, device=DEVICE)
        got = attend(forest, static.plan, torch.cat([queries, padding]), scale=0.25)
    assert torch.equal(got[: len(queries)], expected)


@pytest.mark.parametrize("beside", [False, True])
def test_rows_of_many_new_tokens_get_what_their_plan_gives(beside: bool) -> None:
    """Alone without shared segments, and without splits; beside rows of few with both."""
    requests = [Request(40, ((2, 0, 9),), (17, 20)), Request(50, ((2, 17, 30),), (1, 2))]
    forest = make_forest(requests[: 1 + beside], device=DEVICE)
    with launched():
        expected = attend(forest, forest.plan(), scale=0.25)
        layout = lay_out(forest.pool, forest.slots, forest.counts, forest.tree())
        padded = (len(forest.slots) + 1, len(forest.queries) + 3)
        static = loaded(forest, Room(forest.pool.device), layout, padded).plan
        padding = torch.full((3, 4, 16), torch.nan, device=DEVICE)
        got = attend(forest, static, torch.cat([forest.queries, padding]), scale=0.25)
    assert (static.shared is not None) == beside and (static.max_own > 0) == beside
    assert torch.equal(got[: len(forest.queries)], expected)


@drawn(3)
@given(data=st.data())
def test_steps_write_and_read_what_the_plans_own_steps_do(data: st.DataObject) -> None:
    steps = 3
    forests = [
        make_forest([Request(40, ((2, 17, 30), (2, 10, 14))), Request(21)], device=DEVICE)
        for _ in range(2)
    ]
    options = LayerOptions(scale=0.25, window=None, softcap=None, sinks=None)
    got = []
    padded = data.draw(st.integers(5, 7))
    new = torch.randn(steps, padded, 3, 4, 16).to(DEVICE)
    with launched():
        for forest, is_static in zip(forests, (False, True)):
            forest.pool.reserve(forest.slots, forest.counts * steps)
            rows = (forest.pool, forest.slots, forest.counts, forest.tree(), steps - 1)
            if is_static:
                layout, room = lay_out(*rows), Room(forest.pool.device)
                plan = loaded(forest, room, layout, (padded, padded), back=True).plan
            else:
                plan = KernelPlan.make(*rows)
            out = []
            for step in range(steps):
                if step or is_static:
                    plan.advance()
                q, k, v = new[step, : len(plan.positions)].unbind(1)
                out.append(plan.attend(0, q, k[:, :2], v[:, :2], options)[:5])
            got.append(torch.stack(out))
    assert len(forests[0].slots) == 5 and (plan.write[5:] == -1).all()
    assert torch.equal(got[0], got[1])
    assert torch.equal(forests[0].pool.kv.nan_to_num(), forests[1].pool.kv.nan_to_num())
