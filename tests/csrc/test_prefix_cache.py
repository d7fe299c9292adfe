"""Statements about the prefix cache, one at a time."""

import ctypes

import numpy as np
import pytest

from w2s_fast._pages import PageManager
from w2s_fast.errors import OutOfPages, PageMisuse
from w2s_fast.pages import ragged_int32

PAGE_SIZE = 4
FIRST, SECOND, THIRD = [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]  # a page of tokens each


def i32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def make(num_pages: int = 16, hash_bits: int = 64, prefix_cache: bool = True) -> PageManager:
    return PageManager(num_pages, PAGE_SIZE, 8, 4, prefix_cache, hash_bits)


@pytest.fixture
def manager():
    manager = make()
    yield manager
    manager.check()


def adopt(manager: PageManager, slot: int, tokens: list[int]) -> int:
    return manager.adopt(i32(slot), i32(*tokens), i32(len(tokens))).item()


def match(manager: PageManager, tokens: list[int]) -> int:
    return manager.match(i32(*tokens), i32(len(tokens))).item()


def remember(manager: PageManager, slot: int, tokens: list[int]) -> int:
    return manager.remember(i32(slot), i32(*tokens), i32(len(tokens)))


def grow(manager: PageManager, slot: int, tokens: int) -> np.ndarray:
    copies = manager.reserve(i32(slot), i32(tokens))
    manager.extend(i32(slot), i32(tokens))
    return copies


def begin(manager: PageManager, tokens: list[int]) -> int:
    """A request's beginning: adopt, compute the rest, remember."""
    slot = manager.allocate(1).item()
    grow(manager, slot, len(tokens) - adopt(manager, slot, tokens))
    remember(manager, slot, tokens)
    return slot


def run(manager: PageManager, *prompts: list[int]) -> None:
    """One request after the other, each from its beginning to its end."""
    for prompt in prompts:
        manager.release(i32(begin(manager, prompt)))


def pages(manager: PageManager, slot: int) -> list[int]:
    return [page for page in manager.page_table[slot].tolist() if page >= 0]


def state(manager: PageManager) -> tuple:
    """Everything that can be seen from outside."""
    statistics = manager.cache_statistics
    return (
        manager.page_table.tolist(),
        manager.lengths.tolist(),
        manager.held_pages.tolist(),
        manager.reference_counts.tolist(),
        manager.free_pages,
        manager.free_slots,
        manager.cached_pages,
        statistics.lookups,
        statistics.lookup_tokens,
        statistics.hit_tokens,
        statistics.evictions,
    )


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
    assert manager.reference_counts[pages(manager, slot)].tolist() == [4, 4]


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
    for write in (manager.slot_mapping, manager.extend):
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
    assert manager.slot_mapping(i32(slot), i32(1)).tolist() == [page * PAGE_SIZE]
    manager.trim(i32(slot))
    assert manager.held_pages[slot] == manager.used_pages == 1


def test_the_cache_counts_as_one_reference(manager):
    slot = begin(manager, FIRST + SECOND[:1])
    held = pages(manager, slot)
    assert manager.reference_counts[held].tolist() == [2, 1]
    manager.release(i32(slot))
    assert manager.reference_counts[held].tolist() == [1, 0]


# ---- room ----


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
    """Takes all pages that are simply free, and one of the cache."""
    slot = manager.allocate(1)
    free = manager.num_pages - np.count_nonzero(manager.reference_counts)
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
    assert manager.cached_pages == 0 and manager.reference_counts.sum() == 0
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
    assert manager.reference_counts.sum() == 2
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


# ---- misuse ----

MISUSES = {
    "adopt into a slot with tokens": lambda m, s: m.adopt(s[:1], i32(*FIRST), i32(4)),
    "adopt into a slot with room only": lambda m, s: m.adopt(s[1:2], i32(*FIRST), i32(4)),
    "adopt where one slot is full": lambda m, s: m.adopt(s[[2, 0]], i32(*FIRST * 2), i32(4, 4)),
    "adopt into a free slot": lambda m, s: m.adopt(i32(7), i32(*FIRST), i32(4)),
    "adopt twice into a slot": lambda m, s: m.adopt(s[[2, 2]], i32(*FIRST * 2), i32(4, 4)),
    "adopt with a count too many": lambda m, s: m.adopt(s[2:], i32(*FIRST), i32(4, 0)),
    "adopt with tokens left over": lambda m, s: m.adopt(s[2:], i32(*FIRST), i32(3)),
    "adopt with tokens missing": lambda m, s: m.adopt(s[2:], i32(*FIRST), i32(5)),
    "adopt with a negative count": lambda m, s: m.adopt(s[2:], i32(*FIRST), i32(-4)),
    "match with tokens missing": lambda m, s: m.match(i32(*FIRST), i32(4, 1)),
    "match with a negative count": lambda m, s: m.match(i32(*FIRST), i32(5, -1)),
    "match with counts beyond 32 bits": lambda m, s: m.match(i32(), i32(*[2**31 - 1] * 4)),
    "remember more than there is": lambda m, s: m.remember(s[:1], i32(*[0] * 9), i32(9)),
    "remember a slot twice": lambda m, s: m.remember(s[[0, 0]], i32(*FIRST * 2), i32(4, 4)),
    "remember of a free slot": lambda m, s: m.remember(i32(7), i32(*FIRST), i32(4)),
    "remember with a negative count": lambda m, s: m.remember(s[:1], i32(*FIRST), i32(-4)),
    "remember with tokens left over": lambda m, s: m.remember(s[:1], i32(*FIRST, 5), i32(4)),
    "remember other tokens": lambda m, s: m.remember(s[:1], i32(*THIRD), i32(4)),
    "remember other tokens behind": lambda m, s: m.remember(s[:1], i32(*FIRST, *THIRD), i32(8)),
    "two dimensions": lambda m, s: m.match(i32(*FIRST)[None], i32(4)),
}


@pytest.mark.parametrize("call", MISUSES.values(), ids=MISUSES)
def test_misuse_leaves_the_state_untouched(manager, call):
    run(manager, THIRD)
    slots = np.concatenate([i32(begin(manager, FIRST + SECOND)), manager.allocate(2)])
    manager.reserve(slots[1:2], i32(1))
    before = state(manager)
    with pytest.raises(PageMisuse):
        call(manager, slots)
    assert state(manager) == before
    assert match(manager, FIRST + SECOND) == 8 and match(manager, THIRD) == 4


def test_what_was_added_before_a_misuse_is_found_is_taken_back(manager):
    """Two slots share pages and are said to hold different tokens: known only half way."""
    slot = manager.allocate(1).item()
    grow(manager, slot, 12)
    (child,), _ = manager.fork(i32(slot), i32(1))
    before = state(manager)
    tokens = i32(*FIRST, *SECOND, *THIRD, *FIRST, *THIRD)
    with pytest.raises(PageMisuse, match="page 1 of slot 1 is cached with other tokens"):
        manager.remember(i32(slot, child), tokens, i32(12, 8))
    assert state(manager) == before
    manager.check()
    assert match(manager, FIRST) == 0
    assert remember(manager, slot, FIRST + SECOND + THIRD) == 3


@pytest.mark.parametrize("hash_bits", [-1, 65])
def test_a_hash_of_impossible_width_is_refused(hash_bits):
    with pytest.raises(PageMisuse, match="between 0 and 64"):
        make(hash_bits=hash_bits)


def test_check_misses_a_reference_of_the_cache(manager):
    run(manager, FIRST)
    counts = manager.reference_counts
    address = ctypes.cast(counts.ctypes.data, ctypes.POINTER(ctypes.c_int32))
    address[0] = 0
    with pytest.raises(RuntimeError, match="reference count"):
        manager.check()
    address[0] = 1


def test_check_sees_a_slot_that_holds_a_cached_page_behind_the_wrong_one():
    manager = make()
    slot = begin(manager, FIRST + SECOND)
    table = ctypes.cast(manager.page_table.ctypes.data, ctypes.POINTER(ctypes.c_int32))
    table[4 * slot], table[4 * slot + 1] = table[4 * slot + 1], table[4 * slot]
    with pytest.raises(RuntimeError, match="another one before it"):
        manager.check()
