"""Attention over pages on a CPU: whatever rows share, each gets what dense attention gives it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tiny_models import VOCABULARY, tiny_model
from w2s_fast.attention_blocks import Block
from w2s_fast.dense_attention import LayerOptions
from w2s_fast.gathered_attention import GatheredPlan
from w2s_fast.model import PagedModel
from w2s_fast.pages import PagePool
from w2s_fast.row_tree import Level, RowTree

KV_HEADS, DIM = 2, 8
LAYER = 1


def reference(
    query: Tensor, keys: Tensor, values: Tensor, position: int, options: LayerOptions
) -> Tensor:
    """One token [H, D] over all keys [n, Hkv, D] of its sequence, in float64."""
    query, keys, values = query.double(), keys.double(), values.double()
    first = 0 if options.window is None else max(0, position - options.window + 1)
    out = torch.empty_like(query)
    groups = len(query) // keys.shape[1]
    for h in range(len(query)):
        logits = keys[first : position + 1, h // groups] @ query[h] * options.scale
        if options.softcap is not None:
            logits = torch.tanh(logits / options.softcap) * options.softcap
        if options.sinks is not None:
            logits = torch.cat([logits, options.sinks[h : h + 1].double()])
        weights = logits.softmax(0)[: position + 1 - first]
        out[h] = weights @ values[first : position + 1, h // groups]
    return out


class World:
    """A pool and, beside it, what every slot should hold: keys and values [n, 2, Hkv, D]."""

    def __init__(self, page_size: int, dtype: torch.dtype, seed: int) -> None:
        self.pool = PagePool(2, KV_HEADS, DIM, 3000 // page_size, page_size, 100, 600, dtype, "cpu")
        self.pool.kv.fill_(torch.nan)
        self.held: dict[int, Tensor] = {}
        self.generator = torch.Generator().manual_seed(seed)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.pool.kv.dtype)

    def new(self, length: int) -> int:
        slot = int(self.pool.allocate(1)[0])
        self.held[slot] = self.randn(0, 2, KV_HEADS, DIM)
        if length:
            self.pool.reserve([slot], [length])
            where = self.pool.slot_mapping([slot], [length])
            kv = self.randn(length, 2, KV_HEADS, DIM)
            self.pool.kv[LAYER].flatten(1, 2)[:, where] = kv.transpose(0, 1)
            self.pool.extend([slot], [length])
            self.held[slot] = kv
        return slot

    def grow(self, slot: int, length: int) -> None:
        """Append random tokens."""
        if not length:
            return
        self.pool.reserve([slot], [length])
        where = self.pool.slot_mapping([slot], [length])
        kv = self.randn(length, 2, KV_HEADS, DIM)
        self.pool.kv[LAYER].flatten(1, 2)[:, where] = kv.transpose(0, 1)
        self.pool.extend([slot], [length])
        self.held[slot] = torch.cat([self.held[slot], kv])

    def fork(self, slot: int, children: int) -> list[int]:
        """The slot and ``children - 1`` copies."""
        forked = self.pool.fork([slot], [children - 1]).tolist()
        self.held.update(dict.fromkeys(forked, self.held[slot]))
        return [slot, *forked]

    def release(self, slot: int) -> None:
        self.pool.release([slot])
        del self.held[slot]

    def run(
        self,
        plan: GatheredPlan,
        slots: Sequence[int],
        counts: Sequence[int],
        options: LayerOptions,
        heads: int,
    ) -> tuple[Tensor, Tensor]:
        """One pass of a plan: its result and the reference's, [T, H, D]."""
        total = sum(counts)
        query, kv = self.randn(total, heads, DIM), self.randn(total, 2, KV_HEADS, DIM)
        out = plan.attend(LAYER, query, kv[:, 0], kv[:, 1], options)
        self.pool.extend(slots, counts)
        expected, token = [], 0
        for slot, count in zip(slots, counts, strict=True):
            old = len(self.held[slot])
            self.held[slot] = torch.cat([self.held[slot], kv[token : token + count]])
            keys, values = self.held[slot].unbind(1)
            for i in range(old, old + count):
                assert plan.positions[token] == i
                expected.append(reference(query[token], keys, values, i, options))
                token += 1
        return out, torch.stack(expected)


@dataclass
class Rows:
    """Slots in the order of a pass, and their tree."""

    slots: list[int]
    tree: RowTree

    def only(self, kept: Sequence[bool]) -> Rows:
        """Without some of the rows, as when a request is aborted."""
        slots = [slot for slot, keep in zip(self.slots, kept, strict=True) if keep]
        at = np.cumsum(kept) - 1
        segments = []
        for first, count, begin, end in zip(
            self.tree.first, self.tree.count, self.tree.begin, self.tree.end, strict=True
        ):
            inside = np.flatnonzero(kept[first : first + count])
            if len(inside):
                segments.append((at[first + inside[0]], len(inside), begin, end))
        columns = np.array(segments, np.int32).reshape(-1, 4).T
        return Rows(slots, RowTree(*columns, self.tree.own[np.array(kept)]))  # type: ignore[arg-type]


def requests(
    world: World, prompts: Sequence[int], beams: int, children: int, history: int, own: int
) -> Rows:
    """Rows of several requests: prompt, fork, history, fork, own; pages get out of order."""
    slots: list[int] = []
    levels: list[list[list[int]]] = [[[], []], [[], []]]
    for r, prompt in enumerate(prompts):
        spare = world.new(world.pool.page_size + 1)
        root = world.new(prompt)
        heads = world.fork(root, beams)
        world.release(spare)  # holes for the histories' pages
        for token in range(history):
            for head in heads:
                world.grow(head, 1)
            if token == 1:
                world.release(world.new(1))
        for b, head in enumerate(heads):
            rows = world.fork(head, children)
            for row in rows:
                world.grow(row, own)
                slots.append(row)
                levels[0][0].append(r)
                levels[0][1].append(prompt)
                levels[1][0].append(r * beams + b)
                levels[1][1].append(prompt + history)
    tree = RowTree.of([Level(*level) for level in levels], len(slots))
    return Rows(slots, tree)


options_of = st.builds(
    LayerOptions,
    scale=st.just(DIM**-0.5),
    window=st.sampled_from([None, None, 1, 7, 40, 100]),
    softcap=st.sampled_from([None, None, 2.0]),
    sinks=st.just(None),
)


@settings(max_examples=60)
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
    if data.draw(st.booleans(), "shared"):
        tree = rows.tree
    else:
        tree = rows.tree.only(np.zeros(len(rows.slots), bool))
    slots = rows.slots
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


def assert_close(out: Tensor, expected: Tensor) -> None:
    tolerance = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 6e-3}
    room = tolerance.get(out.dtype, 5e-2)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=room)


PLAIN = LayerOptions(DIM**-0.5, None, None, None)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What blocks were computed, by their kinds."""
    counter: Counter[str] = Counter()
    attend = Block.attend

    def counted(self: Block, *args: Any) -> Any:
        counter["own" if self.newest is not None else "shared"] += 1
        counter["view" if isinstance(self.places, slice) else "gather"] += 1
        counter["padded"] += self.padded is not None
        return attend(self, *args)

    monkeypatch.setattr(Block, "attend", counted)
    return counter


def test_a_prompt_in_consecutive_pages_is_read_where_it_stands(calls: Counter[str]) -> None:
    world = World(4, torch.float32, 0)
    rows = requests(world, [130], 2, 2, history=20, own=1)
    world.pool.reserve(rows.slots, [1] * 4)
    plan = GatheredPlan.make(world.pool, rows.slots, [1] * 4, rows.tree)
    assert_close(*world.run(plan, rows.slots, [1] * 4, PLAIN, KV_HEADS))
    # The prompt, both histories in one product, and all rows' own keys.
    assert calls == {"own": 1, "shared": 2, "view": 1, "gather": 2, "padded": 0}
    keys = sum(block.sequences * block.length for block in (*plan.own, *plan.shared))
    assert keys == rows.tree.keys_read(world.pool.lengths(rows.slots))


def test_rows_without_a_tree_are_one_product(calls: Counter[str]) -> None:
    world = World(4, torch.float32, 0)
    rows = requests(world, [130], 2, 2, history=20, own=1)
    world.pool.reserve(rows.slots, [1] * 4)
    plan = GatheredPlan.make(world.pool, rows.slots, [1] * 4)
    assert_close(*world.run(plan, rows.slots, [1] * 4, PLAIN, KV_HEADS))
    assert calls == {"own": 1, "gather": 1, "padded": 0}


def test_a_prompt_of_one_request_is_appended_without_a_copy_or_a_mask(
    calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Block, "_mask", None)
    world = World(4, torch.float32, 0)
    slot = world.new(0)
    world.pool.reserve([slot], [50])
    plan = GatheredPlan.make(world.pool, [slot], [50])
    assert_close(*world.run(plan, [slot], [50], PLAIN, 3 * KV_HEADS))
    assert calls == {"own": 1, "view": 1, "padded": 0}


def test_a_segment_outside_of_every_window_is_not_read(calls: Counter[str]) -> None:
    world = World(4, torch.float32, 0)
    rows = requests(world, [130], 2, 2, history=20, own=1)
    world.pool.reserve(rows.slots, [1] * 4)
    plan = GatheredPlan.make(world.pool, rows.slots, [1] * 4, rows.tree)
    narrow = PLAIN._replace(window=21)
    assert_close(*world.run(plan, rows.slots, [1] * 4, narrow, KV_HEADS))
    assert calls == {"own": 1, "shared": 1, "gather": 2, "padded": 0}


def test_keys_outside_of_every_window_are_not_read() -> None:
    world = World(4, torch.float32, 0)
    slots = [world.new(100), world.new(100)]
    for slot in slots:  # read with any weight, it would show
        where = world.pool.page_table([slot])[0, : 80 // 4].long()
        world.pool.kv[:, :, where] = torch.nan
    world.pool.reserve(slots, [2, 2])
    plan = GatheredPlan.make(world.pool, slots, [1, 1], ahead=1)
    for step in range(2):
        if step:
            plan.advance()
        out, expected = world.run(plan, slots, [1, 1], PLAIN._replace(window=20), KV_HEADS)
        assert_close(out, expected)


def test_like_segments_of_several_requests_are_one_product(calls: Counter[str]) -> None:
    world = World(4, torch.float32, 0)
    rows = requests(world, [70, 60], 2, 2, history=20, own=1)
    world.pool.reserve(rows.slots, [1] * 8)
    plan = GatheredPlan.make(world.pool, rows.slots, [1] * 8, rows.tree)
    assert_close(*world.run(plan, rows.slots, [1] * 8, PLAIN, KV_HEADS))
    assert calls == {"own": 1, "shared": 2, "gather": 3, "padded": 0}


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


class _NoHostReads(TorchDispatchMode):
    """Refuses operators whose result's shape or value the host would have to wait for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in (
            "_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero",
        )  # fmt: skip
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [PLAIN, LayerOptions(1.0, 40, 2.0, torch.ones(KV_HEADS))])
def test_a_chunk_is_decoded_without_reading_from_the_device(options: LayerOptions) -> None:
    world = World(4, torch.float32, 0)
    rows = requests(world, [70, 30], 2, 2, history=20, own=1)
    world.grow(rows.slots[-1], 3)  # rows of unlike lengths
    world.pool.reserve(rows.slots, [3] * 8)
    plan = GatheredPlan.make(world.pool, rows.slots, [1] * 8, rows.tree, ahead=2)
    query, kv = world.randn(8, KV_HEADS, DIM), world.randn(8, 2, KV_HEADS, DIM)
    with torch.inference_mode(), _NoHostReads():
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
    decodings = [model.decoding(rows, 5, tree), model.decoding(flat, 5)]
    for _ in range(5):
        new = tokens(12)
        torch.testing.assert_close(*(decoding.step(new) for decoding in decodings))
