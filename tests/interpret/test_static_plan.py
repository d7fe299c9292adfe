"""A plan that took over another gives its rows the same bits, whatever it held before.

The operators' paths on the CPU do not look at shared segments; these kernels do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.interpret.attention import launched, trees
from tests.interpret.rule import DEVICE
from tests.kernels.forests import Forest, Request, attend, make_forest
from w2s_fast.attention.contract import LayerOptions
from w2s_fast.attention.kernel import KernelPlan
from w2s_fast.attention.static_plan import Bucket, StaticPlan

ROWS, TOKENS = 10, 40


def loaded(room: StaticPlan, plan: KernelPlan, bucket: Bucket) -> StaticPlan:
    static = room.cut(bucket)
    # The same bucket keeps its splits; here they are full of what another plan may have left.
    static.shared.splits.copy_(torch.tensor([0, 3, 0, 20, 0, 0], dtype=torch.int32))
    static.load(plan)
    return static


def dirty(room: StaticPlan, draw: Callable[..., Any]) -> None:
    """As if any plan had been there before."""
    ours = room.plan
    for tensor in (ours.positions, ours.lengths, ours.cu_seqlens_q, room.stride, ours.write):
        tensor.fill_(draw(st.integers(0, 30)))
    for tensor in (room.shared.own, room.shared.parts, room.shared.token_rows, ours.page_table):
        tensor.fill_(draw(st.integers(0, 3)))


def rows_of(forest: Forest, draw: Callable[..., Any]) -> np.ndarray[Any, Any]:
    rows = range(len(forest.slots))
    kept = st.lists(st.sampled_from(rows), min_size=1, max_size=8, unique=True)
    return np.array(draw(kept.map(sorted)))


@settings(max_examples=12)
@given(data=st.data(), requests=trees(), shared=st.sampled_from([True, True, False]))
def test_attention_is_that_of_the_plan_itself(
    data: st.DataObject, requests: list[Request], shared: bool
) -> None:
    forest = make_forest(requests, device=DEVICE)
    with launched():
        rows = rows_of(forest, data.draw)
        plan, queries = forest.plan(rows, shared), forest.queries_of(rows)
        expected = attend(forest, plan, queries, scale=0.25)
        room = StaticPlan.room(forest.pool, ROWS, TOKENS)
        dirty(room, data.draw)
        more = data.draw(st.tuples(st.integers(0, 2), st.integers(0, 5)))
        padded = (len(rows) + more[0], len(queries) + more[1])
        static = loaded(room, plan, Bucket.of(plan, *padded))
        padding = torch.full((padded[1] - len(queries), 4, 16), torch.nan, device=DEVICE)
        got = attend(forest, static.plan, torch.cat([queries, padding]), scale=0.25)
    assert torch.equal(got[: len(queries)], expected)


@settings(max_examples=3)
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
            plan = KernelPlan.make(
                forest.pool, forest.slots, forest.counts, forest.tree(), ahead=steps - 1
            )
            if is_static:
                room = StaticPlan.room(forest.pool, ROWS, ROWS)
                dirty(room, data.draw)
                static = loaded(room, plan, Bucket.of(plan, padded, padded))
                static.step_back()
                plan = static.plan
            out = []
            for step in range(steps):
                if step or is_static:
                    plan.advance()
                q, k, v = new[step, : len(plan.positions)].unbind(1)
                out.append(plan.attend(0, q, k[:, :2], v[:, :2], options)[:5])
            got.append(torch.stack(out))
    assert len(forests[0].slots) == 5
    assert torch.equal(got[0], got[1])
    assert torch.equal(forests[0].pool.kv.nan_to_num(), forests[1].pool.kv.nan_to_num())
