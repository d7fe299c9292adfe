"""What the prefix cache holds is free for whoever needs pages: the order in which it goes."""

import numpy as np
import pytest

from tests.csrc.managers import PAGE_SIZE, i32, state
from tests.csrc.prompts import FIRST, SECOND, THIRD, adopt, begin, grow, make, match, run
from w2s_fast._pages import PageManager
from w2s_fast.errors import OutOfPages


def test_cached_pages_that_no_slot_holds_count_as_free(manager):
    slot = begin(manager, FIRST + SECOND)
    assert (manager.free_pages, manager.used_pages, manager.cached_pages) == (14, 2, 2)
    manager.release(i32(slot))
    assert (manager.free_pages, manager.used_pages, manager.cached_pages) == (16, 0, 2)
    other = manager.allocate(1).item()
    adopt(manager, other, FIRST)
    assert (manager.free_pages, manager.used_pages, manager.cached_pages) == (15, 1, 2)


def test_nothing_is_evicted_while_another_page_is_free():
    manager = make(num_pages=4)
    run(manager, FIRST + SECOND)
    grow(manager, manager.allocate(1).item(), 8)
    assert manager.cached_pages == 2 and manager.cache_statistics.evictions == 0
    grow(manager, manager.allocate(1).item(), 1)
    assert manager.cached_pages == 1 and manager.cache_statistics.evictions == 1


def test_the_whole_pool_can_be_had_from_a_full_cache():
    manager = make(num_pages=4)
    run(manager, FIRST + SECOND, THIRD + FIRST)
    assert manager.cached_pages == 4
    slot = manager.allocate(1).item()
    grow(manager, slot, 16)
    assert manager.cached_pages == 0 and manager.free_pages == 0
    manager.check()


def evict_one(manager: PageManager) -> None:
    """Takes all pages that are simply free, and one of the cache. No slot may hold a page."""
    assert manager.used_pages == 0
    slot = manager.allocate(1)
    free = manager.num_pages - manager.cached_pages
    manager.reserve(slot, i32((free + 1) * PAGE_SIZE))
    manager.release(slot)


def test_the_page_longest_without_a_slot_is_evicted_first():
    manager = make(num_pages=3)
    run(manager, FIRST, SECOND, THIRD, FIRST)  # FIRST is used again
    for prompt in (SECOND, THIRD, FIRST):
        assert match(manager, prompt) == 4
        evict_one(manager)
        assert match(manager, prompt) == 0
        manager.check()


def test_looking_is_not_using():
    manager = make(num_pages=2)
    run(manager, FIRST, SECOND)
    match(manager, FIRST)
    evict_one(manager)
    assert (match(manager, FIRST), match(manager, SECOND)) == (0, 4)


def test_the_end_of_a_prompt_is_evicted_before_its_beginning():
    manager = make(num_pages=3)
    run(manager, FIRST + SECOND + THIRD)
    for found in (8, 4, 0):
        evict_one(manager)
        assert match(manager, FIRST + SECOND + THIRD) == found
        manager.check()


def test_a_beginning_outlives_all_its_continuations():
    """FIRST was cached first, yet the younger pages that follow it go before it."""
    manager = make(num_pages=4)
    run(manager, FIRST, FIRST + SECOND, FIRST + THIRD)
    for found in ((4, 8), (4, 4), (0, 0)):
        evict_one(manager)
        assert (match(manager, FIRST + SECOND), match(manager, FIRST + THIRD)) == found
        manager.check()


def test_a_page_in_use_is_never_evicted():
    manager = make(num_pages=4)
    slot = begin(manager, FIRST + SECOND)
    other = manager.allocate(1).item()
    grow(manager, other, 8)
    with pytest.raises(OutOfPages, match="1 pages wanted, 0 free of 4"):
        manager.reserve(i32(other), i32(1))
    assert match(manager, FIRST + SECOND) == 8
    manager.truncate(i32(slot), i32(4))  # gives up SECOND, keeps FIRST
    manager.reserve(i32(other), i32(1))
    assert match(manager, FIRST + SECOND) == 4
    manager.check()


EXHAUSTING = {
    "reserve": lambda m, s: m.reserve(s, i32(8, 8, 4)),
    "reserve with copy-on-write": lambda m, s: m.reserve(s, i32(8, 4, 1)),
    "fork, pages": lambda m, s: m.fork(s, i32(5, 0, 0)),
    "fork, slots": lambda m, s: m.fork(s, i32(0, 0, 6)),
    "allocate": lambda m, s: m.allocate(6),
}


@pytest.mark.parametrize("call", EXHAUSTING.values(), ids=EXHAUSTING)
def test_a_failed_operation_evicts_nothing_and_keeps_the_order_of_eviction(call):
    manager = make(num_pages=6)
    begin(manager, FIRST)
    rolled_back = i32(begin(manager, [14] * 4))
    run(manager, SECOND, THIRD, [13] * 4)
    slots = np.concatenate([i32(begin(manager, [15, 16])), manager.allocate(1), rolled_back])
    manager.truncate(rolled_back, i32(2))
    assert manager.free_pages == 3
    before = state(manager)
    with pytest.raises(OutOfPages):
        call(manager, slots)
    assert state(manager) == before
    manager.check()
    for gone in range(1, 4):
        manager.reserve(slots[1:2], i32(gone * PAGE_SIZE))
        found = [match(manager, prompt) for prompt in (SECOND, THIRD, [13] * 4)]
        assert found == [0] * gone + [4] * (3 - gone)


def test_the_cache_never_takes_pages_from_a_pool_of_many_requests():
    """Whatever was cached, as many pages can be had as if nothing had been."""
    manager, plain = make(num_pages=12), make(num_pages=12, prefix_cache=False)
    random = np.random.default_rng(0)
    for _ in range(300):
        prompt = random.integers(1, 3, 4).repeat(PAGE_SIZE).tolist()[: random.integers(1, 17)]
        for m in (manager, plain):
            m.release(i32(begin(m, prompt)))
            assert m.free_pages == 12
            manager.check()
    assert manager.cache_statistics.evictions > 50
    assert plain.cached_pages == 0
