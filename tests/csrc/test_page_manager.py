"""Statements about the page manager, one at a time."""

import ctypes
import gc

import numpy as np
import pytest

from tests.csrc.managers import PAGE_SIZE, i32, pages, state
from w2s_fast._pages import PageManager
from w2s_fast.errors import OutOfPages, PageMisuse, W2SFastError


def make(num_pages: int = 16, max_slots: int = 8, max_pages_per_slot: int = 4) -> PageManager:
    return PageManager(num_pages, PAGE_SIZE, max_slots, max_pages_per_slot)


def grow(manager: PageManager, slots: np.ndarray, *tokens: int) -> np.ndarray:
    copies = manager.reserve(slots, i32(*tokens))
    manager.extend(slots, i32(*tokens))
    return copies


@pytest.fixture
def manager():
    """Without a prefix cache."""
    manager = make()
    yield manager
    manager.check()


def test_a_new_pool_is_all_free(manager):
    assert (manager.num_pages, manager.page_size) == (16, PAGE_SIZE)
    assert (manager.max_slots, manager.max_pages_per_slot) == (8, 4)
    assert (manager.free_pages, manager.used_pages, manager.free_slots) == (16, 0, 8)
    assert (manager.last_pages == -1).all() and (manager.held_pages == -1).all()


def test_a_fresh_slot_is_empty_and_holds_no_page(manager):
    slots = manager.allocate(3)
    assert slots.dtype == np.int32 and slots.tolist() == [0, 1, 2]
    assert manager.lengths[slots].tolist() == [0, 0, 0]
    assert manager.used_pages == 0 and manager.free_slots == 5


def test_reserve_takes_only_the_pages_that_are_missing(manager):
    slots = manager.allocate(2)
    assert manager.pages_needed(slots, i32(4, 5)) == 3
    assert manager.reserve(slots, i32(4, 5)).shape == (0, 2)
    assert manager.used_pages == 3
    assert manager.pages_needed(slots, i32(4, 8)) == 0
    manager.reserve(slots, i32(4, 8))
    assert manager.used_pages == 3
    assert manager.lengths[slots].tolist() == [0, 0]


def test_places_walks_the_pages_of_a_slot(manager):
    slots = manager.allocate(2)
    grow(manager, slots, 3, 2)  # slot 0 holds page 0, slot 1 page 1
    manager.reserve(slots, i32(3, 0))  # slot 0 gains page 2
    mapping = manager.places(slots, i32(3, 1))
    assert mapping.dtype == np.int64
    assert mapping.tolist() == [0 * 4 + 3, 2 * 4 + 0, 2 * 4 + 1, 1 * 4 + 2]


def test_a_pruned_page_is_free_again(manager):
    slots = manager.allocate(2)
    grow(manager, slots, 8, 3)
    manager.release(slots[:1])
    assert manager.used_pages == 1 and manager.free_slots == 7
    assert manager.last_pages[slots[0]] == -1 and manager.lengths[slots[0]] == 0
    manager.release(slots[1:])
    assert manager.free_pages == manager.num_pages


def test_a_page_just_freed_is_the_next_one_used(manager):
    slots = manager.allocate(2)
    grow(manager, slots, 8, 4)
    freed = pages(manager, slots[0])
    manager.release(slots[:1])
    again = manager.allocate(1)
    assert again.tolist() == [slots[0]]
    manager.reserve(again, i32(8))
    assert pages(manager, again[0]) == freed


def test_fork_shares_full_pages_and_copies_a_partial_one(manager):
    (parent,) = slots = manager.allocate(1)
    grow(manager, slots, 6)
    children, copies = manager.fork(slots, i32(2))
    full, partial = pages(manager, parent)
    table = manager.page_table(children)
    assert table[:, 0].tolist() == [full, full]
    assert copies.tolist() == [[partial, own] for own in table[:, 1]]
    assert len({partial, *table[:, 1]}) == 3
    assert manager.holders[[full, partial, *table[:, 1]]].tolist() == [3, 1, 1, 1]
    assert manager.lengths[children].tolist() == [6, 6]


def test_fork_at_a_page_boundary_copies_nothing(manager):
    slots = manager.allocate(1)
    grow(manager, slots, 8)
    _, copies = manager.fork(slots, i32(3))
    assert copies.shape == (0, 2) and manager.used_pages == 2


def test_fork_and_release_touch_one_page_however_long_the_history_is(manager):
    slots = manager.allocate(1)
    grow(manager, slots, 14)
    held = pages(manager, slots[0])
    assert manager.holders[held].tolist() == [1, 1, 1, 1]
    children, copies = manager.fork(slots, i32(2))
    assert manager.holders[held].tolist() == [1, 1, 3, 1]
    assert manager.holders[copies[:, 1]].tolist() == [1, 1]
    manager.release(children)
    assert manager.holders[held].tolist() == [1, 1, 1, 1] and manager.used_pages == 4


def test_fork_groups_children_by_parent_in_order(manager):
    slots = manager.allocate(3)
    grow(manager, slots, 1, 2, 3)
    children, _ = manager.fork(slots[[2, 0, 1]], i32(2, 0, 1))
    assert manager.lengths[children].tolist() == [3, 3, 2]


def test_an_empty_slot_can_be_forked(manager):
    slots = manager.allocate(1)
    children, copies = manager.fork(slots, i32(2))
    assert len(copies) == 0 and manager.lengths[children].tolist() == [0, 0]


def test_fork_leaves_pages_reserved_ahead_with_the_parent(manager):
    slots = manager.allocate(1)
    grow(manager, slots, 4)
    manager.reserve(slots, i32(8))
    children, _ = manager.fork(slots, i32(1))
    assert manager.held_pages[slots[0]] == 3 and manager.held_pages[children[0]] == 1
    assert manager.places(slots, i32(8)).tolist() == list(range(4, 12))
    with pytest.raises(PageMisuse, match="reserve first"):
        manager.places(children, i32(1))


def test_shared_pages_live_until_their_last_owner_is_pruned(manager):
    slots = manager.allocate(1)
    grow(manager, slots, 8)
    children, _ = manager.fork(slots, i32(2))
    manager.release(slots)
    manager.release(children[:1])
    assert manager.used_pages == 2
    manager.release(children[1:])
    assert manager.used_pages == 0


def test_truncate_gives_up_every_page_beyond_the_new_length(manager):
    slots = manager.allocate(2)
    grow(manager, slots, 12, 8)
    manager.reserve(slots, i32(4, 4))
    manager.truncate(slots, i32(5, 0))
    assert manager.lengths[slots].tolist() == [5, 0]
    assert manager.held_pages[slots].tolist() == [2, 0]
    assert manager.used_pages == 2


def test_trim_gives_back_what_was_reserved_ahead(manager):
    slots = manager.allocate(2)
    grow(manager, slots, 5, 4)
    manager.reserve(slots, i32(8, 8))
    manager.trim(slots)
    assert manager.held_pages[slots].tolist() == [2, 1] and manager.used_pages == 3


def test_a_shared_page_cut_by_truncate_is_copied_before_it_is_written(manager):
    slots = manager.allocate(1)
    grow(manager, slots, 8)
    children, _ = manager.fork(slots, i32(1))
    manager.truncate(children, i32(6))
    shared = pages(manager, slots[0])[1]
    for write in (manager.places, manager.extend):
        with pytest.raises(PageMisuse, match="shared"):
            write(children, i32(1))
    assert manager.pages_needed(children, i32(1)) == 1
    copies = manager.reserve(children, i32(1))
    first, fresh = pages(manager, children[0])
    assert copies.tolist() == [[shared, fresh]] and fresh != shared
    assert manager.holders[[first, shared, fresh]].tolist() == [2, 1, 1]
    assert manager.places(children, i32(1)).tolist() == [fresh * PAGE_SIZE + 2]


def test_reserving_nothing_copies_nothing(manager):
    slots = manager.allocate(1)
    grow(manager, slots, 8)
    children, _ = manager.fork(slots, i32(1))
    manager.truncate(children, i32(6))
    assert len(manager.reserve(children, i32(0))) == 0


def test_the_last_of_all_owners_keeps_the_shared_page(manager):
    slots = manager.allocate(1)
    grow(manager, slots, 4)
    children, _ = manager.fork(slots, i32(2))
    owners = np.concatenate([slots, children])
    manager.truncate(owners, i32(1, 2, 3))
    (shared,) = pages(manager, slots[0])
    for _ in range(2):  # asking changes nothing
        assert manager.pages_needed(owners, i32(1, 1, 1)) == 2
    copies = manager.reserve(owners, i32(1, 1, 1))
    assert copies[:, 0].tolist() == [shared, shared] and shared not in copies[:, 1]
    assert pages(manager, owners[2]) == [shared] and manager.used_pages == 3


def test_tables_of_long_histories_are_what_walking_back_finds():
    """Pages are written down by dozens where they are walked, and some of them are given back."""
    manager, draw = PageManager(1500, 2, 12, 300), np.random.default_rng(0)
    slots = list(manager.allocate(2))
    for _ in range(300):
        slot = draw.choice(slots)
        what = draw.choice(["grow", "grow", "grow", "fork", "cut", "release"])
        if what == "fork" and len(slots) < 8:
            slots.extend(manager.fork(i32(slot), i32(1))[0])
        elif what == "cut":
            manager.truncate(i32(slot), i32(int(manager.lengths[slot] * draw.uniform(0.3, 1))))
        elif what == "release" and len(slots) > 2:
            manager.release(i32(slot))
            slots.remove(slot)
        elif manager.lengths[slot] < 500 and manager.free_pages > 100:
            grow(manager, i32(slot), int(draw.integers(1, 90)))
        table = manager.page_table(i32(*slots))
        for found, slot in zip(table, slots):
            walked, page = [], manager.last_pages[slot]
            for _ in range(manager.held_pages[slot]):
                walked.append(page)
                page = manager.pages_before[page]
            assert found[: len(walked)].tolist() == walked[::-1]
        manager.check()


def test_a_page_table_is_as_wide_as_its_longest_slot(manager):
    slots = manager.allocate(3)
    grow(manager, slots, 9, 2, 0)
    table = manager.page_table(slots[[1, 0, 2, 1]])
    assert table.dtype == np.int32
    first, second, third = pages(manager, slots[0])
    (other,) = pages(manager, slots[1])
    assert len({first, second, third, other}) == 4
    short = [other, -1, -1]
    assert table.tolist() == [short, [first, second, third], [-1, -1, -1], short]
    assert manager.page_table(slots[2:]).shape == (1, 0)
    assert manager.page_table(i32()).shape == (0, 0)


VIEWS = ("lengths", "held_pages", "last_pages", "pages_before", "holders")


def test_views_share_memory_stay_in_place_and_are_read_only(manager):
    views = {name: getattr(manager, name) for name in VIEWS}
    slots = manager.allocate(2)
    grow(manager, slots, 5, 1)
    (first, second), (other,) = (pages(manager, slot) for slot in slots)
    assert views["lengths"][slots].tolist() == [5, 1]
    assert views["held_pages"][slots].tolist() == [2, 1]
    assert views["last_pages"][slots].tolist() == [second, other]
    assert views["pages_before"][[first, second, other]].tolist() == [-1, first, -1]
    assert views["holders"].sum() == 3
    for name, view in views.items():
        assert view.ctypes.data == getattr(manager, name).ctypes.data
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 1


def test_a_view_keeps_its_manager_alive():
    manager = make()
    grow(manager, manager.allocate(1), 7)
    lengths = manager.lengths
    del manager
    gc.collect()
    assert lengths[0] == 7


EXHAUSTING = {
    "allocate": lambda m, s: m.allocate(7),
    "fork, slots": lambda m, s: m.fork(s, i32(1, 6)),
    "fork, pages": lambda m, s: m.fork(s, i32(5, 0)),
    "reserve": lambda m, s: m.reserve(s, i32(8, 12)),
}


@pytest.mark.parametrize("call", EXHAUSTING.values(), ids=EXHAUSTING)
def test_exhaustion_leaves_the_state_untouched(call):
    manager = make(num_pages=7)
    slots = manager.allocate(2)
    grow(manager, slots, 6, 4)
    before = state(manager)
    with pytest.raises(OutOfPages):
        call(manager, slots)
    assert state(manager) == before
    manager.check()


def test_exhaustion_says_what_was_wanted_what_is_free_and_what_exists(manager):
    slots = manager.allocate(8)
    with pytest.raises(OutOfPages, match="32 pages wanted, 16 free of 16") as caught:
        manager.reserve(slots, np.full(8, 16, np.int32))
    assert isinstance(caught.value, RuntimeError) and isinstance(caught.value, W2SFastError)
    with pytest.raises(OutOfPages, match="1 slots wanted, 0 free of 8"):
        manager.allocate(1)


MISUSES = {
    "repeated slot": lambda m, s: m.reserve(s[[0, 0]], i32(1, 1)),
    "repeated slot in fork": lambda m, s: m.fork(s[[0, 0]], i32(1, 1)),
    "repeated slot in release": lambda m, s: m.release(s[[1, 1]]),
    "free slot": lambda m, s: m.release(i32(s[0], 7)),
    "unknown slot": lambda m, s: m.trim(i32(s[0], 99)),
    "negative slot": lambda m, s: m.truncate(i32(s[0], -1), i32(0, 0)),
    "negative count of slots": lambda m, s: m.allocate(-1),
    "negative tokens": lambda m, s: m.reserve(s, i32(1, -1)),
    "negative tokens to extend": lambda m, s: m.extend(s, i32(1, -1)),
    "negative counts": lambda m, s: m.fork(s, i32(1, -1)),
    "negative lengths": lambda m, s: m.truncate(s, i32(1, -1)),
    "sizes that differ": lambda m, s: m.reserve(s, i32(1)),
    "sizes that differ in fork": lambda m, s: m.fork(s, i32(1, 1, 1)),
    "two dimensions": lambda m, s: m.release(s[None]),
    "more tokens than a row has": lambda m, s: m.reserve(s, i32(1, 13)),
    "tokens beyond 32 bits": lambda m, s: m.pages_needed(s, i32(1, 2**31 - 1)),
    "extend beyond the reserved": lambda m, s: m.extend(s, i32(1, 1)),
    "mapping beyond the reserved": lambda m, s: m.places(s, i32(1, 1)),
    "longer by truncate": lambda m, s: m.truncate(s, i32(1, 5)),
    "table of a free slot": lambda m, s: m.page_table(i32(s[0], 7)),
    "table of an unknown slot": lambda m, s: m.page_table(i32(99)),
}


@pytest.mark.parametrize("call", MISUSES.values(), ids=MISUSES)
def test_misuse_leaves_the_state_untouched(manager, call):
    slots = manager.allocate(2)
    grow(manager, slots, 6, 4)
    before = state(manager)
    with pytest.raises(PageMisuse):
        call(manager, slots)
    assert state(manager) == before


@pytest.mark.parametrize("wrong", [[0], np.array([0]), np.array([0.0]), np.zeros(4, "i4")[::2]])
def test_only_contiguous_int32_arrays_are_taken(manager, wrong):
    manager.allocate(4)
    with pytest.raises(TypeError):
        manager.release(wrong)


@pytest.mark.parametrize("sizes", [(0, 1, 1, 1), (1, 0, 1, 1), (1, 1, -1, 1), (1, 2**20, 1, 2**20)])
def test_a_pool_of_impossible_size_is_refused(sizes):
    with pytest.raises(PageMisuse):
        PageManager(*sizes)


# Slot 0 has pages 0 and 1, and page 2 reserved; slot 1 has pages 0 and 1, and half of page 3.
@pytest.mark.parametrize(
    ("column", "index", "value", "rule"),
    [
        ("last_pages", 1, 2, "count of holders"),
        ("last_pages", 0, 99, "does not exist"),
        ("last_pages", 5, 3, "before its first"),
        ("pages_before", 2, 0, "does not exist"),
        ("pages_before", 1, -1, "does not exist"),
        ("pages_before", 0, 3, "before its first"),
        ("pages_before", 3, 2, "before its first"),
        ("lengths", 0, 13, "too few pages"),
        ("lengths", 1, 4, "shares a page reserved ahead"),
        ("lengths", 1, 6, "shares a partial page that is not its last"),
        ("holders", 0, 2, "count of holders"),
        ("holders", 1, 1, "count of holders"),
        ("holders", 4, 1, "count of holders"),
        ("held_pages", 0, 2, "before its first"),
        ("held_pages", 0, 5, "more pages than a slot may"),
        ("held_pages", 5, 0, "slot is in use"),
    ],
)
def test_check_names_the_broken_rule(column, index, value, rule):
    manager = make()
    slots = manager.allocate(1)
    grow(manager, slots, 8)
    children, _ = manager.fork(slots, i32(1))
    manager.reserve(slots, i32(4))
    grow(manager, children, 2)
    manager.check()
    view = getattr(manager, column)
    ctypes.c_int32.from_address(view.ctypes.data + index * view.strides[0]).value = value
    with pytest.raises(RuntimeError, match=rule):
        manager.check()
