"""Misuse of the prefix cache is refused and changes nothing; check() sees what is wrong."""

import ctypes

import numpy as np
import pytest

from tests.csrc.managers import i32, pages, state
from tests.csrc.prompts import FIRST, SECOND, THIRD, begin, grow, make, match, remember, run
from w2s_fast.errors import PageMisuse

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


def test_check_sees_a_cached_page_in_use_that_no_slot_holds(manager):
    run(manager, FIRST)
    holders = number(manager.holders, 0)
    holders.value = 1
    with pytest.raises(RuntimeError, match="count of holders"):
        manager.check()
    holders.value = 0


def number(view, index):
    """One of a view, which is not to be written to, to be written to."""
    return ctypes.c_int32.from_address(view.ctypes.data + index * view.strides[0])


@pytest.mark.parametrize("held", [True, False])
def test_check_sees_a_cached_page_behind_the_wrong_one(held):
    manager = make()
    slot = begin(manager, FIRST + SECOND)
    first, second = pages(manager, slot)
    if held:  # the other way round
        number(manager.last_pages, slot).value = first
        number(manager.pages_before, first).value = second
    else:
        manager.release(i32(slot))
    number(manager.pages_before, second).value = -1
    with pytest.raises(RuntimeError, match="another one than in the cache"):
        manager.check()
