"""What attention over pages on a CPU reads: each shared key once, and nothing in vain."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from tests.support.world import KV_HEADS, PLAIN, World, assert_close, requests
from w2s_fast.attention.blocks import Block
from w2s_fast.attention.gathered import GatheredPlan


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
