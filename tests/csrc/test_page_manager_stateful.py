"""Random sequences of operations on a page manager agree with the model in page_model.py."""

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.csrc.page_model import PageModel, i32
from tests.support.drawn import TIMES
from w2s_fast._pages import PageManager
from w2s_fast.errors import PageMisuse

EXAMPLES = 110 * TIMES


class Pages(PageModel, RuleBasedStateMachine):
    # Few different tokens, so that prompts begin alike; or so many that no two are the same.
    @initialize(
        alphabet=st.sampled_from([1, 2, 10**9]),
        prefix_cache=st.sampled_from([True, True, False]),
        hash_bits=st.sampled_from([0, 2, 64]),
        num_pages=st.integers(2, 30),
        page_size=st.integers(1, 5),
        max_slots=st.integers(2, 10),
        max_pages=st.integers(2, 6),
        prompt=st.integers(0, 10),
        beams=st.integers(0, 3),
    )
    def start(
        self,
        alphabet,
        prefix_cache,
        hash_bits,
        num_pages,
        page_size,
        max_slots,
        max_pages,
        prompt,
        beams,
    ):
        manager = PageManager(num_pages, page_size, max_slots, max_pages, prefix_cache, hash_bits)
        self.start_with(manager, alphabet)
        # Begin as a search does, so that pages are shared from the start.
        self.allocate_slots(1)
        prompt = [min(prompt, self.room(0))]
        if self.reserve_tokens([0], prompt):
            self.write_tokens([0], prompt)
        self.fork_slots([0], [beams])

    # -- what is drawn --

    def draw_slots(self, data, min_size=1) -> list[int]:
        slots = st.sampled_from(sorted(self.tokens))
        return data.draw(st.lists(slots, unique=True, min_size=min_size), "slots")

    def draw_amounts(self, data, slots, largest) -> list[int]:
        return [data.draw(st.integers(0, largest(slot)), f"for slot {slot}") for slot in slots]

    def draw_prompt(self, data) -> list[int]:
        """One that begins like a cached one, or like a live slot, or like nothing."""
        begun = [(), *sorted(self.cached), *map(tuple, self.tokens.values())]
        capacity = self.manager.max_pages_per_slot * self.manager.page_size
        beginning = data.draw(st.sampled_from(begun), "begins like")
        more = data.draw(st.integers(0, 3 * self.manager.page_size), "more tokens")
        bits = data.draw(st.integers(0, 2**more - 1), "their bits")
        return [*beginning, *(bits >> i & 1 for i in range(more))][:capacity]

    # -- operations --

    @rule(n=st.integers(0, 2))
    def allocate(self, n):
        self.allocate_slots(n)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def reserve(self, data):
        slots = self.draw_slots(data)
        self.reserve_tokens(slots, self.draw_amounts(data, slots, self.several))

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), careful=st.integers(0, 3))
    def write(self, data, careful):
        slots = self.draw_slots(data)
        largest = self.writable if careful else self.several
        self.write_tokens(slots, self.draw_amounts(data, slots, largest))

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def reserve_and_write(self, data):
        slots = self.draw_slots(data)
        counts = self.draw_amounts(data, slots, self.several)
        if self.reserve_tokens(slots, counts):
            assert self.write_tokens(slots, counts)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def fork(self, data):
        slots = self.draw_slots(data)
        self.fork_slots(slots, self.draw_amounts(data, slots, lambda slot: 2))

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def truncate(self, data):
        slots = self.draw_slots(data)
        self.cut(slots, self.draw_amounts(data, slots, lambda slot: len(self.tokens[slot])))

    @precondition(lambda self: max(self.owners().values(), default=0) > 1)
    @rule(data=st.data())
    def roll_back_into_a_shared_page_and_rewrite(self, data):
        """What a change of tokenisation does to one of several hypotheses."""
        owners = self.owners()
        shared = {
            slot: sum(owners[page] > 1 for page in self.pages[slot]) * self.manager.page_size
            for slot in self.tokens
        }
        sharing = st.sampled_from(sorted(slot for slot, n in shared.items() if n))
        slots = data.draw(st.lists(sharing, unique=True, min_size=1), "slots")
        lengths = [
            data.draw(st.integers(0, min(shared[slot], len(self.tokens[slot])))) for slot in slots
        ]
        self.cut(slots, lengths)
        for slot in slots:
            self.write_tokens([slot], [min(1, self.room(slot))])  # refused, if it would be seen
        counts = [self.several(slot) for slot in slots]
        if self.reserve_tokens(slots, counts):
            assert self.write_tokens(slots, counts)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def trim(self, data):
        slots = self.draw_slots(data)
        self.attempt(True, PageMisuse, self.manager.trim, i32(slots))
        for slot in slots:
            del self.pages[slot][self.pages_of(len(self.tokens[slot])) :]

    @precondition(lambda self: len(self.tokens) > 1)
    @rule(data=st.data())
    def release(self, data):
        self.release_slots(self.draw_slots(data)[: len(self.tokens) // 2])

    # -- the prefix cache --

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), careful=st.integers(0, 3))
    def adopt(self, data, careful):
        slots = self.draw_slots(data)
        if careful:
            slots = [slot for slot in slots if not self.pages[slot]]
        self.adopt_prompts(slots, [self.draw_prompt(data) for _ in slots])

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), careful=st.integers(0, 3))
    def remember(self, data, careful):
        slots = self.draw_slots(data)
        beyond = 0 if careful else 1
        lengths = self.draw_amounts(data, slots, lambda slot: len(self.tokens[slot]) + beyond)
        self.remember_tokens(slots, lengths)

    @rule(data=st.data(), requests=st.integers(1, 4), end=st.booleans())
    def run_requests(self, data, requests, end):
        """One after the other: adopt, compute the rest, remember; and make room for the next."""
        for _ in range(requests):
            live = set(self.tokens)
            if len(live) == self.manager.max_slots:
                self.release_slots(sorted(live)[1:])
                live = set(self.tokens)
            self.allocate_slots(1)
            slots = sorted(set(self.tokens) - live)
            prompt = self.draw_prompt(data)
            assert self.adopt_prompts(slots, [prompt])
            rest = prompt[len(self.tokens[slots[0]]) :]
            if self.reserve_tokens(slots, [len(rest)]):
                assert self.write_tokens(slots, [len(rest)], rest)
                self.remember_tokens(slots, [len(prompt)])
            if end and len(self.tokens) > 1:
                self.release_slots(slots)

    @precondition(lambda self: self.idle and len(self.tokens) > 1)
    @rule(data=st.data())
    def reserve_most_of_what_is_free(self, data):
        left = data.draw(st.integers(-1, 3), "pages left")
        wanted = self.manager.free_pages - left
        slots, counts = sorted(self.tokens), []
        for slot in slots:
            held = len(self.pages[slot])
            own = held * self.manager.page_size - len(self.tokens[slot])
            pages = max(0, min(wanted, self.manager.max_pages_per_slot - held))
            counts.append(own + pages * self.manager.page_size if pages else 0)
            wanted -= pages
        if self.reserve_tokens(slots, counts):
            self.release_slots(slots[::2])

    @precondition(lambda self: self.cached)
    @rule(seldom=st.integers(0, 9))
    def drop_cache(self, seldom):
        if seldom == 0:
            self.attempt(True, PageMisuse, self.manager.drop_cache)
            self.cached.clear()
            self.idle.clear()

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def misuse(self, data):
        slots = self.draw_slots(data)
        m = self.manager
        wrong = data.draw(st.sampled_from([-1, m.max_slots, slots[0]]), "wrong slot")
        bad, ones = i32([*slots, wrong]), np.ones(len(slots) + 1, np.int32)
        call = data.draw(st.sampled_from([m.reserve, m.extend, m.fork, m.truncate]), "call")
        self.attempt(False, PageMisuse, call, bad, ones)
        self.attempt(False, PageMisuse, call, bad, ones[1:])
        self.attempt(False, PageMisuse, call, i32(slots), -ones[1:])
        self.attempt(False, PageMisuse, m.release, bad)
        longer = i32([len(self.tokens[slot]) + 1 for slot in slots])
        self.attempt(False, PageMisuse, m.truncate, i32(slots), longer)
        for slot in slots:
            prompt = self.tokens[slot][: m.page_size]
            if self.cached.get(tuple(prompt), -1) in self.pages[slot][:1]:
                lie = i32([*prompt[:-1], prompt[-1] + 1])
                size = i32([len(lie)])
                self.attempt(False, PageMisuse, m.remember, i32([slot]), lie, size)

    # -- what must hold after every operation --

    @invariant()
    def each_slot_reads_back_its_own_tokens(self):
        assert np.flatnonzero(self.manager.held_pages >= 0).tolist() == sorted(self.tokens)
        for slot, tokens in self.tokens.items():
            assert self.manager.lengths[slot] == len(tokens)
            values = [self.value_of(tokens[: i + 1]) for i in range(len(tokens))]
            assert self.memory[self.pages[slot]].reshape(-1)[: len(tokens)].tolist() == values

    @invariant()
    def each_slot_holds_the_pages_it_should(self):
        assert self.tables() == self.pages
        for slot, pages in self.pages.items():
            assert self.manager.held_pages[slot] == len(pages)

    @invariant()
    def holders_follow_from_the_tables_and_the_rest_is_free(self):
        self.manager.check()
        holders = self.holders()
        counts = self.manager.holders.tolist()
        assert counts == [holders[page] for page in range(self.manager.num_pages)]
        assert self.manager.free_pages == self.manager.num_pages - len(self.slots_with())
        assert self.manager.free_slots == self.manager.max_slots - len(self.tokens)

    @invariant()
    def cached_pages_hold_the_tokens_that_they_are_found_by(self):
        assert self.manager.cached_pages == len(self.cached)
        for key, page in self.cached.items():
            values = [self.value_of(key[: i + 1]) for i in range(len(key))]
            assert self.memory[page].tolist() == values[-self.manager.page_size :]

    def teardown(self):
        if hasattr(self, "manager"):
            self.release_slots(sorted(self.tokens))
            self.manager.check()
            assert self.manager.free_pages == self.manager.num_pages
            assert self.manager.free_slots == self.manager.max_slots


@pytest.mark.long
def test_random_operations_agree_with_the_model():
    run_state_machine_as_test(
        Pages,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=80,
            deadline=None,
            derandomize=True,  # the same run everywhere; raise EXAMPLES to search further
            suppress_health_check=list(HealthCheck),
        ),
    )
    # Not vacuous: thousands of operations were done, and the interesting things happened.
    done = Pages.done
    pages = ("copied on write", "pages adopted", "pages remembered", "evicted")
    assert done.total() - done["refused"] - sum(done[name] for name in pages) >= 5_000 * TIMES
    assert min(done[name] for name in ("extend", "fork", "truncate", "refused")) >= 120 * TIMES
    assert done["copied on write"] >= 15 * TIMES
    assert (
        min(done[name] for name in ("pages adopted", "pages remembered", "evicted")) >= 100 * TIMES
    )
