"""A page manager's model in plain Python, and the manager beside it.

The model keeps, for each slot, the list of its tokens and the list of its pages. Which page is
taken next is the manager's to choose; all else that becomes of the lists follows from the
operations. Beside them stands a memory with one value for each (page, offset), written only where
places says and copied only where the returned copies say, as the owner of a KV tensor would do.
The value stands for the token and all tokens before it, as keys and values do. If the manager
shared a page that it should not, freed one still in use, or found a wrong one in the prefix cache,
some slot would read back another's tokens.

Of the prefix cache the model knows which beginnings are cached, in which page, and in which order
they will be evicted.
"""

from collections import Counter
from itertools import chain, islice, takewhile
from typing import ClassVar

import numpy as np

from w2s_fast._pages import PageManager
from w2s_fast.errors import OutOfPages, PageMisuse

GARBAGE = -1


def i32(values) -> np.ndarray:
    return np.array(values, np.int32)


class PageModel:
    """Operations done to the manager and to the model, which must agree."""

    # Over all examples: operations that succeeded, operations refused, pages that were copied on
    # write, adopted, remembered or evicted.
    done: ClassVar[Counter] = Counter()

    def start_with(self, manager: PageManager, alphabet: int) -> None:
        """A new manager; the tokens written to it are numbers below ``alphabet``."""
        self.manager = manager
        self.memory = np.full((manager.num_pages, manager.page_size), GARBAGE, np.int64)
        self.tokens: dict[int, list[int]] = {}  # of each live slot
        self.pages: dict[int, list[int]] = {}  # of each live slot, reserved ones too
        self.next_token = 0
        self.alphabet = alphabet
        self.beginnings: dict[tuple[int, ...], int] = {}  # the value that stands for each
        self.cached: dict[tuple[int, ...], int] = {}  # beginning, in full pages: its last page
        self.idle: list[tuple[int, ...]] = []  # those that no slot holds, next to be evicted first

    # -- what the model can say without the manager's own counts --

    def pages_of(self, tokens: int) -> int:
        return -(-tokens // self.manager.page_size)

    def tables(self) -> dict[int, list[int]]:
        """The manager's own, of each slot."""
        slots = sorted(self.tokens)
        rows = self.manager.page_table(i32(slots)).tolist()
        return {s: [p for p in row if p >= 0] for s, row in zip(slots, rows, strict=True)}

    def slots_with(self) -> Counter:
        """How many slots have each page."""
        return Counter(chain(*self.pages.values()))

    def owners(self) -> Counter:
        """Those, and the cache."""
        return self.slots_with() + Counter(self.cached.values())

    def holders(self) -> Counter:
        """How many slots end in each page, and how many different pages follow it."""
        rows = self.pages.values()
        follows = {page: row[i] for row in rows for i, page in enumerate(row[1:])}
        return Counter(row[-1] for row in rows if row) + Counter(follows.values())

    def unused(self) -> int:
        """Pages that neither a slot nor the cache holds."""
        return self.manager.num_pages - len(self.owners())

    def value_of(self, tokens: list[int]) -> int:
        return self.beginnings.setdefault(tuple(tokens), len(self.beginnings))

    def full_pages(self, tokens) -> list[tuple[int, ...]]:
        size = self.manager.page_size
        return [tuple(tokens[:end]) for end in range(size, len(tokens) + 1, size)]

    def room(self, slot: int) -> int:
        capacity = self.manager.max_pages_per_slot * self.manager.page_size
        return capacity - len(self.tokens[slot])

    def several(self, slot: int) -> int:
        return min(self.room(slot), 2 * self.manager.page_size)

    def partial(self, slot: int) -> int | None:
        whole, rest = divmod(len(self.tokens[slot]), self.manager.page_size)
        return self.pages[slot][whole] if rest else None

    def writable(self, slot: int) -> int:
        if self.owners()[self.partial(slot)] > 1:
            return 0
        return len(self.pages[slot]) * self.manager.page_size - len(self.tokens[slot])

    # -- what happens in every operation --

    def state(self) -> tuple:
        m = self.manager
        arrays = (m.lengths, m.held_pages, m.last_pages, m.pages_before, m.holders)
        s = m.cache_statistics
        counts = (m.free_pages, m.free_slots, m.cached_pages, s.lookups, s.hit_tokens, s.evictions)
        return (*(array.tobytes() for array in arrays), *counts)

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

    def copy(self, copies: np.ndarray) -> None:
        assert not set(copies[:, 0].tolist()) & set(copies[:, 1].tolist())
        assert len(set(copies[:, 1].tolist())) == len(copies)
        self.memory[copies[:, 1]] = self.memory[copies[:, 0]]

    def evict(self, pages: int) -> None:
        for key in self.idle[: max(0, pages)]:
            del self.cached[key]
            self.done["evicted"] += 1
        del self.idle[: max(0, pages)]

    def let_go(self, dropped: list[int]) -> None:
        """Cached pages become idle when the last slot lets go of them, in that order."""
        in_use = self.slots_with()
        last = {page: i for i, page in enumerate(dropped)}
        idle = [key for key, page in self.cached.items() if page not in in_use]
        new = [key for key in idle if key not in self.idle]
        self.idle += sorted(new, key=lambda key: last[self.cached[key]])

    # -- operations --

    def allocate_slots(self, n: int) -> None:
        enough = n <= self.manager.max_slots - len(self.tokens)
        if done := self.attempt(enough, OutOfPages, self.manager.allocate, n):
            slots = done[0].tolist()
            assert len(slots) == n and not set(slots) & self.tokens.keys()
            self.tokens |= {slot: [] for slot in slots}
            self.pages |= {slot: [] for slot in slots}

    def reserve_tokens(self, slots, wanted) -> bool:
        owners, rewritten, missing = self.owners(), [], dict.fromkeys(slots, 0)
        for slot, n in zip(slots, wanted, strict=True):
            if n == 0:
                continue
            if (page := self.partial(slot)) is not None and owners[page] > 1:
                owners[page] -= 1
                rewritten.append((slot, page))
            pages = self.pages_of(len(self.tokens[slot]) + n)
            missing[slot] = max(0, pages - len(self.pages[slot]))
        needed = len(rewritten) + sum(missing.values())
        assert self.manager.pages_needed(i32(slots), i32(wanted)) == needed
        enough = needed <= self.manager.num_pages - len(self.slots_with())
        evicted = needed - self.unused()
        if done := self.attempt(enough, OutOfPages, self.manager.reserve, i32(slots), i32(wanted)):
            copies = done[0]
            self.copy(copies)
            self.done["copied on write"] += len(copies)
            assert copies[:, 0].tolist() == [page for _, page in rewritten]
            taken = copies[:, 1].tolist()
            before, after = self.slots_with(), self.tables()
            for (slot, page), copy in zip(rewritten, taken, strict=True):
                assert self.pages[slot][-1] == page  # else others have it, too, and what follows
                self.pages[slot][-1] = copy
            for slot, n in missing.items():
                new = after[slot][len(after[slot]) - n :] if n else []
                self.pages[slot] += new
                taken += new
            assert len(set(taken)) == needed and before.keys().isdisjoint(taken)
            self.evict(evicted)
            self.let_go([page for _, page in rewritten])
        return enough

    def write_tokens(self, slots, counts, tokens=None) -> bool:
        allowed = all(n <= self.writable(slot) for slot, n in zip(slots, counts, strict=True))
        args = i32(slots), i32(counts)
        where = self.attempt(allowed, PageMisuse, self.manager.places, *args)
        done = self.attempt(allowed, PageMisuse, self.manager.extend, *args)
        if where and done:
            if tokens is None:
                new = range(self.next_token, self.next_token + sum(counts))
                tokens = [token % self.alphabet for token in new]
                self.next_token += len(tokens)
            assert len(set(where[0].tolist())) == len(tokens)
            values, rest = [], iter(tokens)
            for slot, n in zip(slots, counts, strict=True):
                for token in islice(rest, n):
                    self.tokens[slot].append(token)
                    values.append(self.value_of(self.tokens[slot]))
            self.memory.reshape(-1)[where[0]] = values
        return allowed

    def fork_slots(self, slots, counts) -> None:
        pairs = list(zip(slots, counts, strict=True))
        pages = sum(n for slot, n in pairs if self.partial(slot) is not None)
        free_slots = self.manager.max_slots - len(self.tokens)
        free_pages = self.manager.num_pages - len(self.slots_with())
        enough = sum(counts) <= free_slots and pages <= free_pages
        evicted = pages - self.unused()
        if done := self.attempt(enough, OutOfPages, self.manager.fork, i32(slots), i32(counts)):
            children, copies = done[0]
            self.copy(copies)
            self.evict(evicted)
            before, rest = self.slots_with(), iter(copies.tolist())
            assert before.keys().isdisjoint(copies[:, 1].tolist())
            parents = [slot for slot, n in pairs for _ in range(n)]
            for child, parent in zip(children.tolist(), parents, strict=True):
                assert child not in self.tokens
                self.tokens[child] = list(self.tokens[parent])
                full = len(self.tokens[parent]) // self.manager.page_size
                self.pages[child] = self.pages[parent][:full]
                if (page := self.partial(parent)) is not None:
                    source, destination = next(rest)
                    assert source == page
                    self.pages[child].append(destination)
            assert next(rest, None) is None

    def cut(self, slots, lengths) -> None:
        pairs = list(zip(slots, lengths, strict=True))
        dropped = [page for slot, n in pairs for page in self.pages[slot][self.pages_of(n) :][::-1]]
        self.attempt(True, PageMisuse, self.manager.truncate, i32(slots), i32(lengths))
        for slot, n in pairs:
            del self.tokens[slot][n:], self.pages[slot][self.pages_of(n) :]
        self.let_go(dropped)

    def release_slots(self, slots) -> None:
        dropped = [page for slot in slots for page in self.pages[slot][::-1]]
        self.attempt(True, PageMisuse, self.manager.release, i32(slots))
        for slot in slots:
            del self.tokens[slot], self.pages[slot]
        self.let_go(dropped)

    def adopt_prompts(self, slots, prompts) -> bool:
        found = []
        for prompt in prompts:
            keys = self.full_pages(prompt)
            found.append(list(takewhile(self.cached.__contains__, keys)))
        lengths = [len(keys) * self.manager.page_size for keys in found]
        flat, counts = i32(list(chain(*prompts))), i32([len(prompt) for prompt in prompts])
        assert self.manager.match(flat, counts).tolist() == lengths
        allowed = not any(self.pages[slot] for slot in slots)
        if done := self.attempt(allowed, PageMisuse, self.manager.adopt, i32(slots), flat, counts):
            assert done[0].tolist() == lengths
            for slot, keys in zip(slots, found, strict=True):
                self.tokens[slot] = list(keys[-1]) if keys else []
                self.pages[slot] = [self.cached[key] for key in keys]
                self.idle = [key for key in self.idle if key not in keys]
                self.done["pages adopted"] += len(keys)
        return allowed

    def remember_tokens(self, slots, lengths) -> None:
        pairs = list(zip(slots, lengths, strict=True))
        prompts = [(self.tokens[slot] + [0])[:n] for slot, n in pairs]
        allowed = all(n <= len(self.tokens[slot]) for slot, n in pairs)
        args = i32(slots), i32(list(chain(*prompts))), i32(lengths)
        if done := self.attempt(allowed, PageMisuse, self.manager.remember, *args):
            before = len(self.cached)
            for slot, prompt in zip(slots, prompts, strict=True):
                pages = zip(self.full_pages(prompt), self.pages[slot], strict=False)
                for key, page in pages:
                    if not self.manager.prefix_cache or self.cached.setdefault(key, page) != page:
                        break
            assert done[0] == len(self.cached) - before
            self.done["pages remembered"] += done[0]
