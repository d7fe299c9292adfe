"""What the prefix cache finds, and what slots and cache share; statements one at a time."""

import numpy as np
import pytest

from tests.csrc.managers import PAGE_SIZE, i32, pages
from tests.csrc.prompts import (
    FIRST,
    SECOND,
    THIRD,
    adopt,
    begin,
    grow,
    make,
    match,
    remember,
    run,
)
from w2s_fast._pages import PageManager
from w2s_fast.cache.pages import ragged_int32
from w2s_fast.errors import PageMisuse

# ---- what is found ----


def test_a_prompt_is_found_after_its_request_has_ended(manager):
    slot = begin(manager, FIRST + SECOND)
    before = pages(manager, slot)
    manager.release(i32(slot))
    other = manager.allocate(1).item()
    assert adopt(manager, other, FIRST + SECOND) == 8
    assert pages(manager, other) == before
    assert manager.lengths[other] == 8


def test_a_prompt_is_found_while_its_request_runs(manager):
    slot = begin(manager, FIRST + SECOND)
    other = manager.allocate(1).item()
    assert adopt(manager, other, FIRST + SECOND) == 8
    assert pages(manager, other) == pages(manager, slot)
    assert manager.used_pages == 2


def test_only_full_pages_are_cached_and_found(manager):
    run(manager, FIRST + SECOND[:3])
    assert manager.cached_pages == 1
    assert match(manager, FIRST + SECOND) == 4
    assert match(manager, FIRST[:3]) == 0
    assert match(manager, []) == 0


def test_the_longest_cached_beginning_is_attached(manager):
    run(manager, FIRST + SECOND + THIRD)
    slot = manager.allocate(1).item()
    assert adopt(manager, slot, FIRST + SECOND + [9, 10, 11, 0, 1]) == 8
    assert len(pages(manager, slot)) == 2


def test_a_page_is_found_only_behind_the_pages_that_it_followed(manager):
    run(manager, FIRST + SECOND)
    assert match(manager, SECOND) == 0
    assert match(manager, THIRD + SECOND) == 0
    assert match(manager, SECOND + FIRST) == 0


def test_prompts_that_part_ways_share_what_they_have_in_common(manager):
    run(manager, FIRST + SECOND, FIRST + THIRD)
    assert manager.cached_pages == 3
    assert match(manager, FIRST + SECOND) == match(manager, FIRST + THIRD) == 8


def test_several_prompts_are_found_in_one_call(manager):
    run(manager, FIRST + SECOND, THIRD)
    slots = manager.allocate(4)
    prompts = [THIRD + FIRST, [], FIRST + SECOND, SECOND]
    flat, counts = ragged_int32(prompts)
    assert manager.match(flat, counts).tolist() == [4, 0, 8, 0]
    adopted = manager.adopt(slots, flat, counts)
    assert adopted.dtype == np.int32 and adopted.tolist() == [4, 0, 8, 0]
    assert manager.lengths[slots].tolist() == [4, 0, 8, 0]
    assert manager.held_pages[slots].tolist() == [1, 0, 2, 0]


def test_a_prompt_remembered_in_two_parts_is_found_whole(manager):
    slot = manager.allocate(1).item()
    grow(manager, slot, 6)
    assert remember(manager, slot, FIRST + SECOND[:2]) == 1
    grow(manager, slot, 6)
    assert remember(manager, slot, FIRST + SECOND + THIRD) == 2
    assert remember(manager, slot, FIRST + SECOND + THIRD) == 0
    assert match(manager, FIRST + SECOND + THIRD) == 12


def test_a_fork_of_a_remembered_slot_adds_nothing_new(manager):
    slot = begin(manager, FIRST + SECOND)
    children, copies = manager.fork(i32(slot), i32(2))
    assert len(copies) == 0
    assert remember(manager, children[0], FIRST + SECOND) == 0
    assert [pages(manager, child) for child in children] == [pages(manager, slot)] * 2
    assert manager.used_pages == manager.cached_pages == 2


@pytest.mark.parametrize("hash_bits", [0, 1, 2, 64])
def test_pages_whose_hashes_collide_are_told_apart_by_their_tokens(hash_bits):
    manager = make(num_pages=30, hash_bits=hash_bits)
    prompts = [[a] * 4 + [b] * 4 + [c] * 4 for a in (1, 2) for b in (1, 2, 3) for c in (1, 2, 3)]
    run(manager, *prompts)
    manager.check()
    found = {}
    for prompt in prompts:
        assert match(manager, [*prompt, 7, 7, 7, 7]) == 12
        (slot,) = manager.allocate(1)
        adopt(manager, slot, prompt)
        for end in (4, 8, 12):
            page = pages(manager, slot)[end // 4 - 1]
            assert found.setdefault(page, prompt[:end]) == prompt[:end]
        manager.release(i32(slot))
    assert manager.cached_pages == len(found) == 2 + 6 + 18
    assert match(manager, [1, 1, 1, 2]) == match(manager, [3] * 4) == 0


# ---- sharing ----


def test_a_page_cached_already_stays_and_the_slot_keeps_its_own(manager):
    slots = manager.allocate(2).tolist()
    for slot in slots:
        grow(manager, slot, 8)
    before = [pages(manager, slot) for slot in slots]
    assert remember(manager, slots[0], FIRST + SECOND) == 2
    assert remember(manager, slots[1], FIRST + SECOND) == 0
    assert [pages(manager, slot) for slot in slots] == before
    manager.release(i32(*slots))
    other = manager.allocate(1).item()
    adopt(manager, other, FIRST + SECOND)
    assert pages(manager, other) == before[0]


def test_what_follows_a_page_that_is_not_the_cached_one_is_not_cached(manager):
    """Else the cached page would have to stay for it, though no slot holds that page."""
    slots = manager.allocate(2).tolist()
    for slot in slots:
        grow(manager, slot, 8)
    remember(manager, slots[0], FIRST + SECOND)
    assert remember(manager, slots[1], FIRST + THIRD) == 0
    manager.release(i32(slots[0]))
    assert manager.used_pages == 2  # the cache keeps nothing from being free
    assert match(manager, FIRST + THIRD) == 4


def test_a_cached_page_is_copied_before_it_is_written(manager):
    slot = begin(manager, FIRST + SECOND)
    cached = pages(manager, slot)[1]
    manager.truncate(i32(slot), i32(6))
    for write in (manager.places, manager.extend):
        with pytest.raises(PageMisuse, match="shared"):
            write(i32(slot), i32(1))
    assert manager.pages_needed(i32(slot), i32(1)) == 1
    copies = grow(manager, slot, 1)
    assert copies.tolist() == [[cached, pages(manager, slot)[1]]]
    assert pages(manager, slot)[1] != cached
    assert match(manager, FIRST + SECOND) == 8


def test_the_last_of_all_slots_that_rewrite_a_cached_page_copies_it_too(manager):
    slot = begin(manager, FIRST)
    (child,), _ = manager.fork(i32(slot), i32(1))
    both = i32(slot, child)
    manager.truncate(both, i32(1, 2))
    assert manager.pages_needed(both, i32(1, 1)) == 2
    assert len(manager.reserve(both, i32(1, 1))) == 2
    assert match(manager, FIRST) == 4


def test_a_page_given_up_by_copy_on_write_is_not_handed_out_in_the_same_call():
    """It is still to be copied from."""
    manager = make(num_pages=4)
    slots = [begin(manager, FIRST), begin(manager, SECOND)]
    manager.truncate(i32(*slots), i32(1, 1))
    assert manager.free_pages == 2
    copies = manager.reserve(i32(*slots), i32(1, 1))
    assert len(copies) == 2 and not set(copies[:, 0]) & set(copies[:, 1])
    manager.check()


def test_pages_reserved_ahead_are_written_while_the_prompt_is_cached(manager):
    slot = begin(manager, FIRST)
    manager.reserve(i32(slot), i32(8))
    page = pages(manager, slot)[1]
    assert manager.places(i32(slot), i32(1)).tolist() == [page * PAGE_SIZE]
    manager.trim(i32(slot))
    assert manager.held_pages[slot] == manager.used_pages == 1


def test_the_cache_keeps_a_page_without_holding_it(manager):
    slot = begin(manager, FIRST + SECOND[:1])
    held = pages(manager, slot)
    assert manager.holders[held].tolist() == [1, 1]
    manager.release(i32(slot))
    assert manager.holders[held].tolist() == [0, 0]
    assert manager.cached_pages == 1 and manager.free_pages == manager.num_pages
    slots = manager.allocate(2)
    manager.reserve(slots, i32(16, 16))  # others first
    assert held[1] in manager.page_table(slots) and held[0] not in manager.page_table(slots)
    assert match(manager, FIRST) == 4


def test_pages_adopted_are_held_from_the_last_one_backwards(manager):
    run(manager, FIRST + SECOND + THIRD)
    slots = manager.allocate(2)
    adopt(manager, slots[0], FIRST + SECOND + THIRD)
    whole = pages(manager, slots[0])
    assert manager.holders[whole].tolist() == [1, 1, 1]
    adopt(manager, slots[1], FIRST)
    assert manager.holders[whole].tolist() == [2, 1, 1]
    manager.release(slots[:1])
    assert manager.holders[whole].tolist() == [1, 0, 0]


# ---- switches and statistics ----


def test_without_the_cache_nothing_is_found_and_nothing_kept():
    manager = make(prefix_cache=False)
    assert not manager.prefix_cache and make().prefix_cache
    slot = begin(manager, FIRST + SECOND)
    assert remember(manager, slot, FIRST + SECOND) == 0
    assert match(manager, FIRST + SECOND) == 0
    manager.release(i32(slot))
    manager.check()
    other = manager.allocate(1).item()
    assert adopt(manager, other, FIRST + SECOND) == 0
    assert manager.cached_pages == 0 and manager.holders.sum() == 0
    assert manager.cache_statistics.lookups == 0
    manager.drop_cache()
    manager.check()


def test_the_cache_is_off_unless_asked_for():
    assert not PageManager(4, 4, 2, 2).prefix_cache


def test_a_dropped_cache_finds_nothing_and_slots_keep_their_pages(manager):
    run(manager, THIRD)
    slot = begin(manager, FIRST + SECOND)
    held = pages(manager, slot)
    manager.drop_cache()
    manager.check()
    assert (
        manager.cached_pages == 0 and match(manager, FIRST + SECOND) == match(manager, THIRD) == 0
    )
    assert pages(manager, slot) == held and manager.used_pages == 2
    assert manager.holders[held].tolist() == [1, 1] and manager.holders.sum() == 2
    manager.truncate(i32(slot), i32(6))
    assert len(grow(manager, slot, 2)) == 0  # its own again: nothing to copy
    assert remember(manager, slot, FIRST + SECOND) == 2


def test_statistics_count_lookups_hits_and_evictions():
    manager = make(num_pages=2)
    run(manager, FIRST + SECOND[:1])
    run(manager, FIRST + SECOND)
    run(manager, THIRD)
    statistics = manager.cache_statistics
    assert (statistics.lookups, statistics.lookup_tokens) == (3, 5 + 8 + 4)
    assert (statistics.hit_tokens, statistics.evictions) == (4, 1)
    match(manager, FIRST)
    assert manager.cache_statistics.lookups == 3
    run(manager, FIRST)
    assert statistics.lookups == 3, "statistics are a snapshot"
