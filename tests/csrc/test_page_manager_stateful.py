"""Random sequences of operations against a model in plain Python.

The model keeps, for each slot, the list of its tokens. Beside it stands a memory with one value
for each (page, offset), written only where slot_mapping says and copied only where the returned
copies say, as the owner of a KV tensor would do. If the manager shared a page that it should not,
or freed one still in use, some slot would read back another's tokens.
"""

from collections import Counter
from typing import ClassVar

import numpy as np
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

from w2s_fast._pages import PageManager
from w2s_fast.errors import OutOfPages, PageMisuse

GARBAGE = -1
EXAMPLES = 180


def i32(values) -> np.ndarray:
    return np.array(values, np.int32)


class Pages(RuleBasedStateMachine):
    # Over all examples: operations that succeeded, pages copied on write, operations refused.
    done: ClassVar[Counter] = Counter()

    @initialize(
        num_pages=st.integers(2, 40),
        page_size=st.integers(1, 5),
        max_slots=st.integers(2, 10),
        max_pages=st.integers(2, 6),
        prompt=st.integers(0, 10),
        beams=st.integers(0, 3),
    )
    def start(self, num_pages, page_size, max_slots, max_pages, prompt, beams):
        self.manager = PageManager(num_pages, page_size, max_slots, max_pages)
        self.memory = np.full((num_pages, page_size), GARBAGE, np.int64)
        self.tokens: dict[int, list[int]] = {}  # of each live slot
        self.held: dict[int, int] = {}  # pages each live slot should hold
        self.next_token = 0
        # Begin as a search does, so that pages are shared from the start.
        self.allocate(1)
        prompt = [min(prompt, self.room(0))]
        if self.reserve_tokens([0], prompt):
            self.write_tokens([0], prompt)
        self.fork_slots([0], [beams])

    # -- helpers: what the model can say without the manager's own counts --

    def pages_of(self, tokens: int) -> int:
        return -(-tokens // self.manager.page_size)

    def row(self, slot: int) -> list[int]:
        return [page for page in self.manager.page_table[slot].tolist() if page >= 0]

    def owners(self) -> Counter:
        return Counter(page for slot in self.tokens for page in self.row(slot))

    def draw_slots(self, data, min_size=1) -> list[int]:
        slots = st.sampled_from(sorted(self.tokens))
        return data.draw(st.lists(slots, unique=True, min_size=min_size), "slots")

    def draw_amounts(self, data, slots, largest) -> list[int]:
        return [data.draw(st.integers(0, largest(slot)), f"for slot {slot}") for slot in slots]

    def room(self, slot: int) -> int:
        capacity = self.manager.max_pages_per_slot * self.manager.page_size
        return capacity - len(self.tokens[slot])

    def several(self, slot: int) -> int:
        return min(self.room(slot), 2 * self.manager.page_size)

    def partial(self, slot: int) -> int | None:
        whole, rest = divmod(len(self.tokens[slot]), self.manager.page_size)
        return self.row(slot)[whole] if rest else None

    def copy(self, copies: np.ndarray) -> None:
        assert not set(copies[:, 0].tolist()) & set(copies[:, 1].tolist())
        assert len(set(copies[:, 1].tolist())) == len(copies)
        self.memory[copies[:, 1]] = self.memory[copies[:, 0]]

    def attempt(self, allowed: bool, error: type, call, *args):
        """The call succeeds if, and only if, the model says so; a failed one changes nothing."""
        before = self.state()
        try:
            result = call(*args)
        except error:
            assert not allowed
            assert self.state() == before
            self.done["refused"] += 1
            return None
        assert allowed
        self.done[call.__name__] += 1
        return (result,)

    def state(self) -> tuple:
        m = self.manager
        arrays = (m.page_table, m.lengths, m.held_pages, m.reference_counts)
        return (*(array.tobytes() for array in arrays), m.free_pages, m.free_slots)

    # -- operations --

    @rule(n=st.integers(0, 2))
    def allocate(self, n):
        enough = n <= self.manager.max_slots - len(self.tokens)
        if done := self.attempt(enough, OutOfPages, self.manager.allocate, n):
            slots = done[0].tolist()
            assert len(slots) == n and not set(slots) & self.tokens.keys()
            self.tokens |= {slot: [] for slot in slots}
            self.held |= dict.fromkeys(slots, 0)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def reserve(self, data):
        slots = self.draw_slots(data)
        self.reserve_tokens(slots, self.draw_amounts(data, slots, self.several))

    def reserve_tokens(self, slots, wanted) -> bool:
        owners, needed, held = self.owners(), 0, dict(self.held)
        for slot, n in zip(slots, wanted, strict=True):
            if n == 0:
                continue
            if (page := self.partial(slot)) is not None and owners[page] > 1:
                owners[page] -= 1
                needed += 1
            held[slot] = max(held[slot], self.pages_of(len(self.tokens[slot]) + n))
            needed += held[slot] - self.held[slot]
        assert self.manager.pages_needed(i32(slots), i32(wanted)) == needed
        enough = needed <= self.manager.num_pages - len(self.owners())
        if done := self.attempt(enough, OutOfPages, self.manager.reserve, i32(slots), i32(wanted)):
            self.copy(done[0])
            self.done["copied on write"] += len(done[0])
            self.held = held
        return enough

    def writable(self, slot: int) -> int:
        if self.owners()[self.partial(slot)] > 1:
            return 0
        return self.held[slot] * self.manager.page_size - len(self.tokens[slot])

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

    def write_tokens(self, slots, counts) -> bool:
        allowed = all(n <= self.writable(slot) for slot, n in zip(slots, counts, strict=True))
        args = i32(slots), i32(counts)
        where = self.attempt(allowed, PageMisuse, self.manager.slot_mapping, *args)
        done = self.attempt(allowed, PageMisuse, self.manager.extend, *args)
        if where and done:
            values = list(range(self.next_token, self.next_token + sum(counts)))
            self.next_token += len(values)
            assert len(set(where[0].tolist())) == len(values)
            self.memory.reshape(-1)[where[0]] = values
            for slot, n in zip(slots, counts, strict=True):
                self.tokens[slot] += values[:n]
                del values[:n]
        return allowed

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def fork(self, data):
        slots = self.draw_slots(data)
        self.fork_slots(slots, self.draw_amounts(data, slots, lambda slot: 2))

    def fork_slots(self, slots, counts) -> None:
        pairs = list(zip(slots, counts, strict=True))
        pages = sum(n for slot, n in pairs if self.partial(slot) is not None)
        free_slots = self.manager.max_slots - len(self.tokens)
        free_pages = self.manager.num_pages - len(self.owners())
        enough = sum(counts) <= free_slots and pages <= free_pages
        if done := self.attempt(enough, OutOfPages, self.manager.fork, i32(slots), i32(counts)):
            children, copies = done[0]
            self.copy(copies)
            parents = [slot for slot, n in pairs for _ in range(n)]
            for child, parent in zip(children.tolist(), parents, strict=True):
                assert child not in self.tokens
                self.tokens[child] = list(self.tokens[parent])
                self.held[child] = self.pages_of(len(self.tokens[parent]))

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
            slot: sum(owners[page] > 1 for page in self.row(slot)) * self.manager.page_size
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

    def cut(self, slots, lengths) -> None:
        self.attempt(True, PageMisuse, self.manager.truncate, i32(slots), i32(lengths))
        for slot, n in zip(slots, lengths, strict=True):
            del self.tokens[slot][n:]
            self.held[slot] = self.pages_of(n)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def trim(self, data):
        slots = self.draw_slots(data)
        self.attempt(True, PageMisuse, self.manager.trim, i32(slots))
        self.held |= {slot: self.pages_of(len(self.tokens[slot])) for slot in slots}

    @precondition(lambda self: len(self.tokens) > 1)
    @rule(data=st.data())
    def release(self, data):
        slots = self.draw_slots(data)[: len(self.tokens) // 2]
        self.attempt(True, PageMisuse, self.manager.release, i32(slots))
        for slot in slots:
            del self.tokens[slot], self.held[slot]

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

    # -- what must hold after every operation --

    @invariant()
    def each_slot_reads_back_its_own_tokens(self):
        assert np.flatnonzero(self.manager.held_pages >= 0).tolist() == sorted(self.tokens)
        for slot, tokens in self.tokens.items():
            assert self.manager.lengths[slot] == len(tokens)
            assert self.memory[self.row(slot)].reshape(-1)[: len(tokens)].tolist() == tokens

    @invariant()
    def each_slot_holds_the_pages_it_should(self):
        for slot, held in self.held.items():
            assert len(self.row(slot)) == self.manager.held_pages[slot] == held

    @invariant()
    def reference_counts_are_occurrences_and_the_rest_is_free(self):
        self.manager.check()
        owners = self.owners()
        counts = self.manager.reference_counts.tolist()
        assert counts == [owners[page] for page in range(self.manager.num_pages)]
        assert self.manager.free_pages == counts.count(0)
        assert self.manager.free_slots == self.manager.max_slots - len(self.tokens)

    def teardown(self):
        if hasattr(self, "manager"):
            self.manager.release(i32(sorted(self.tokens)))
            self.manager.check()
            assert self.manager.free_pages == self.manager.num_pages
            assert self.manager.free_slots == self.manager.max_slots


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
    # Not vacuous: the interesting things happened, and often.
    # Not vacuous: ten thousand operations were done, and the interesting things happened.
    done = Pages.done
    assert done.total() - done["refused"] - done["copied on write"] >= 10_000
    assert min(done[name] for name in ("extend", "fork", "truncate", "refused")) >= 300
    assert done["copied on write"] >= 30
