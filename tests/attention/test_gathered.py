"""Attention over pages on a CPU: whatever rows share, each gets what dense attention gives it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support.drawn import drawn
from tests.support.no_host import NoHost
from tests.support.tiny_models import VOCABULARY, tiny_model
from tests.support.world import DIM, KV_HEADS, LAYER, PLAIN, World, assert_close, requests
from w2s_fast.attention.contract import LayerOptions
from w2s_fast.attention.gathered import GatheredPlan
from w2s_fast.attention.row_tree import Level, RowTree
from w2s_fast.decoding import Decoding
from w2s_fast.models.model import PagedModel

options_of = st.builds(
    LayerOptions,
    scale=st.just(DIM**-0.5),
    window=st.sampled_from([None, None, 1, 7, 40, 100]),
    softcap=st.sampled_from([None, None, 2.0]),
    sinks=st.just(None),
)


@drawn(60)
@given(
    prompts=st.lists(st.sampled_from([1, 15, 16, 31, 64, 70, 130]), min_size=1, max_size=3),
    beams=st.integers(1, 3),
    children=st.integers(1, 3),
    history=st.sampled_from([0, 1, 16, 25]),
    own=st.integers(0, 3),
    page_size=st.sampled_from([1, 4, 16]),
    groups=st.sampled_from([1, 3]),
    options=options_of,
    sinks=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    data=st.data(),
)
def test_appended_and_decoded_rows_get_dense_attention(
    prompts: list[int],
    beams: int,
    children: int,
    history: int,
    own: int,
    page_size: int,
    groups: int,
    options: LayerOptions,
    sinks: bool,
    dtype: torch.dtype,
    data: st.DataObject,
) -> None:
    world = World(page_size, dtype, seed=len(prompts) + own)
    heads = groups * KV_HEADS
    if sinks:
        options = options._replace(sinks=world.randn(heads))
    rows = requests(world, prompts, beams, children, history, own)
    kept = data.draw(st.lists(st.booleans(), min_size=len(rows.slots), max_size=len(rows.slots)))
    if any(kept):
        rows = rows.only(kept)
    slots = rows.slots
    tree = rows.tree if data.draw(st.booleans(), "shared") else RowTree.of([], len(slots))
    most = data.draw(st.sampled_from([1, 5]), "tokens")
    counts = data.draw(
        st.lists(st.integers(1, most), min_size=len(slots), max_size=len(slots)), "counts"
    )

    world.pool.reserve(slots, counts)
    plan = GatheredPlan.make(world.pool, slots, counts, tree)
    assert_close(*world.run(plan, slots, counts, options, heads))

    ones = [1] * len(slots)
    steps = 4
    world.pool.reserve(slots, [steps] * len(slots))
    plan = GatheredPlan.make(world.pool, slots, ones, tree, ahead=steps - 1)
    address = plan.positions.data_ptr()
    for step in range(steps):
        if step:
            plan.advance()
        assert_close(*world.run(plan, slots, ones, options, heads))
    assert plan.positions.data_ptr() == address


@pytest.mark.parametrize("heads", [KV_HEADS, 3 * KV_HEADS])
def test_a_row_does_not_depend_on_the_others(heads: int) -> None:
    world = World(16, torch.float32, 0)
    rows = requests(world, [70, 130, 20], 2, 3, history=33, own=2)
    slots, ones = rows.slots, [1] * len(rows.slots)
    query, kv = world.randn(len(slots), heads, DIM), world.randn(len(slots), 2, KV_HEADS, DIM)
    world.pool.reserve(slots, ones)

    def attend(kept: Sequence[bool]) -> Tensor:
        some = rows.only(kept)
        plan = GatheredPlan.make(world.pool, some.slots, [1] * len(some.slots), some.tree)
        of = torch.tensor(kept)
        return plan.attend(LAYER, query[of], kv[of, 0], kv[of, 1], PLAIN)

    together = attend([True] * len(slots))
    for i in range(len(slots)):
        for kept in ([j == i for j in range(len(slots))], [j >= i for j in range(len(slots))]):
            torch.testing.assert_close(attend(kept)[0], together[i], rtol=0, atol=1e-6)


def test_a_broken_request_does_not_touch_the_others() -> None:
    world = World(16, torch.float32, 0)
    rows = requests(world, [70, 70], 2, 2, history=20, own=1)
    world.pool.reserve(rows.slots, [3] * 8)
    plan = GatheredPlan.make(world.pool, rows.slots, [3] * 8, rows.tree)
    query, kv = world.randn(24, KV_HEADS, DIM), world.randn(24, 2, KV_HEADS, DIM)
    sound = plan.attend(LAYER, query, kv[:, 0], kv[:, 1], PLAIN)
    kv[12:] = torch.nan
    broken = plan.attend(LAYER, query, kv[:, 0], kv[:, 1], PLAIN)
    assert torch.equal(broken[:12], sound[:12])
    assert broken[12:].isnan().all()


@pytest.mark.parametrize("options", [PLAIN, LayerOptions(1.0, 40, 2.0, torch.ones(KV_HEADS))])
def test_a_chunk_is_decoded_without_reading_from_the_device(options: LayerOptions) -> None:
    world = World(4, torch.float32, 0)
    rows = requests(world, [70, 30], 2, 2, history=20, own=1)
    world.grow(rows.slots[-1], 3)  # rows of unlike lengths
    world.pool.reserve(rows.slots, [3] * 8)
    plan = GatheredPlan.make(world.pool, rows.slots, [1] * 8, rows.tree, ahead=2)
    query, kv = world.randn(8, KV_HEADS, DIM), world.randn(8, 2, KV_HEADS, DIM)
    with torch.inference_mode(), NoHost():
        for _ in range(2):
            plan.attend(LAYER, query, kv[:, 0], kv[:, 1], options)
            plan.advance()


def test_advancing_is_planning_anew() -> None:
    world = World(4, torch.float64, 0)
    rows = requests(world, [70, 20], 2, 2, history=20, own=1)
    ones = [1] * 8
    world.pool.reserve(rows.slots, [5] * 8)
    plan = GatheredPlan.make(world.pool, rows.slots, ones, rows.tree, ahead=4)
    for step in range(5):
        if step:
            plan.advance()
        fresh = GatheredPlan.make(world.pool, rows.slots, ones, rows.tree)
        assert torch.equal(plan.positions, fresh.positions)
        assert torch.equal(plan.write, fresh.write)
        query, kv = world.randn(8, KV_HEADS, DIM), world.randn(8, 2, KV_HEADS, DIM)
        for options in (PLAIN, PLAIN._replace(window=30)):
            results = [p.attend(LAYER, query, kv[:, 0], kv[:, 1], options) for p in (plan, fresh)]
            torch.testing.assert_close(*results, rtol=0, atol=1e-14)
        world.pool.extend(rows.slots, ones)


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "mistral", "gemma2"])
def test_a_model_decodes_and_appends_with_a_tree_as_without(family: str) -> None:
    model = PagedModel(tiny_model(family), kv_cache_tokens=2048, page_size=4)
    generator = torch.Generator().manual_seed(0)

    def tokens(n: int) -> Tensor:
        return torch.randint(VOCABULARY, (n,), generator=generator)

    prompts = [40, 23]
    roots = model.pool.allocate(2)
    model.forward(roots, tokens(63), prompts)
    heads = np.concatenate([[r, *model.pool.fork([r], [1])] for r in roots])
    for _ in range(18):
        model.forward(heads, tokens(4), [1] * 4)
    rows = np.concatenate([[h, *model.pool.fork([h], [2])] for h in heads])
    flat = model.pool.fork(rows, [1] * 12)
    ends = np.repeat(prompts, 6)
    tree = RowTree.of([Level(np.arange(12) // 6, ends), Level(np.arange(12) // 3, ends + 18)], 12)
    assert len(tree.first) == 6
    chunk, counts = tokens(24), [1, 2, 3] * 4
    torch.testing.assert_close(
        model.forward(rows, chunk, counts, tree), model.forward(flat, chunk, counts)
    )
    decodings = [Decoding(model, rows, 5, tree), Decoding(model, flat, 5)]
    for _ in range(5):
        new = tokens(12)
        torch.testing.assert_close(*(decoding.step(new) for decoding in decodings))
