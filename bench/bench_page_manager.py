"""The page manager's operations at the size of a large round: 1,024 sequences of 64 pages.

Each is forked into one child, and the children are pruned again: the host work of one round of
search with a thousand live hypotheses. Pages of a sequence lie scattered over the pool, as they do
when sequences grow side by side. With the prefix cache, prompts have nothing in common.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from w2s_fast._pages import PageManager

pytestmark = pytest.mark.benchmark(group="page manager")

PAGE_SIZE = 16


def grown(manager: PageManager, slots: np.ndarray, tokens: int) -> None:
    """Slots of ``tokens`` tokens, grown side by side a page at a time, in any order."""
    shuffle = np.random.default_rng(0).permutation
    for begin in range(0, tokens, manager.page_size):
        step = np.full(len(slots), min(manager.page_size, tokens - begin), np.int32)
        order = shuffle(slots)
        manager.reserve(order, step)
        manager.extend(order, step)


class Sequences:
    """Slots of equal length, a child of each, and prompts for all of them.

    Attributes:
        parents, ones: int32 [slots].
        prompts: int32 [slots * tokens], random; counts: int32 [slots], of their tokens.
    """

    def __init__(self, slots: int, pages: int, tokens: int) -> None:
        self.manager = PageManager(
            slots * (pages + 2), PAGE_SIZE, 2 * slots, pages + 1, prefix_cache=True
        )
        self.parents = self.manager.allocate(slots)
        grown(self.manager, self.parents, tokens)
        self.ones = np.ones(slots, np.int32)
        self.children = np.empty(0, np.int32)
        self.prompts = np.random.default_rng(1).integers(0, 50_000, slots * tokens, np.int32)
        self.counts = np.full(slots, tokens, np.int32)

    def fork(self) -> None:
        self.children, _ = self.manager.fork(self.parents, self.ones)

    def release(self) -> None:
        self.manager.release(self.children)

    def remember(self) -> None:
        self.manager.remember(self.parents, self.prompts, self.counts)

    def adopt(self) -> None:
        self.manager.adopt(self.parents, self.prompts, self.counts)

    def empty(self) -> None:
        """The parents anew, without tokens."""
        self.manager.release(self.parents)
        self.parents = self.manager.allocate(len(self.parents))


Timed = Callable[..., None]


@pytest.fixture
def timed(benchmark: BenchmarkFixture, rounds: Callable[[float], int]) -> Timed:
    """Times ``run``; ``undo`` brings back what was before, untimed."""

    def time_rounds(run: Callable[[], object], undo: Callable[[], object] = lambda: None) -> None:
        begin = time.perf_counter()
        run()
        undo()
        count = rounds(time.perf_counter() - begin)
        benchmark.pedantic(run, teardown=undo, rounds=count)

    return time_rounds


@pytest.fixture
def shape(sizes: str, benchmark: BenchmarkFixture) -> tuple[int, int]:
    """Slots, and pages of each."""
    slots, pages = (8, 4) if sizes == "quick" else (1024, 64)
    benchmark.extra_info |= {"slots": slots, "pages": pages, "page_size": PAGE_SIZE}
    return slots, pages


@pytest.fixture
def held(shape: tuple[int, int]) -> Sequences:
    """Sequences of full pages."""
    slots, pages = shape
    return Sequences(slots, pages, pages * PAGE_SIZE)


@pytest.mark.parametrize("last_page", ["full", "half"])
def test_fork(timed: Timed, shape: tuple[int, int], last_page: str) -> None:
    slots, pages = shape
    tokens = pages * PAGE_SIZE - (PAGE_SIZE // 2 if last_page == "half" else 0)
    held = Sequences(slots, pages, tokens)
    timed(held.fork, held.release)


def test_release(timed: Timed, held: Sequences) -> None:
    held.fork()
    timed(held.release, held.fork)


def test_reserve(timed: Timed, held: Sequences) -> None:
    held.fork()
    manager = held.manager
    timed(
        lambda: manager.reserve(held.children, held.ones),
        lambda: manager.trim(held.children),
    )


def test_places(timed: Timed, held: Sequences) -> None:
    held.fork()
    held.manager.reserve(held.children, held.ones)
    timed(lambda: held.manager.places(held.children, held.ones))


def test_page_table(timed: Timed, held: Sequences) -> None:
    timed(lambda: held.manager.page_table(held.parents))


def test_remember_new_prompts(timed: Timed, held: Sequences) -> None:
    timed(held.remember, held.manager.drop_cache)


def test_remember_known_prompts(timed: Timed, held: Sequences) -> None:
    held.remember()
    timed(held.remember)


def test_match(timed: Timed, held: Sequences) -> None:
    held.remember()
    timed(lambda: held.manager.match(held.prompts, held.counts))


def test_adopt(timed: Timed, held: Sequences) -> None:
    held.remember()
    held.empty()
    timed(held.adopt, held.empty)


def test_release_what_is_cached(timed: Timed, held: Sequences) -> None:
    held.remember()
    slots = held.parents

    def again() -> None:
        held.parents = held.manager.allocate(len(slots))
        held.adopt()

    timed(lambda: held.manager.release(held.parents), again)


@pytest.mark.parametrize("pages", [10, 1000])
def test_fork_and_release_of_16_children(timed: Timed, sizes: str, pages: int) -> None:
    """How long the histories are should not matter."""
    slots = 2 if sizes == "quick" else 64
    manager = PageManager(slots * pages, PAGE_SIZE, slots * 17, pages)
    parents = manager.allocate(slots)
    grown(manager, parents, pages * PAGE_SIZE)
    counts = np.full(slots, 16, np.int32)

    def run() -> None:
        children, _ = manager.fork(parents, counts)
        manager.release(children)

    timed(run)
