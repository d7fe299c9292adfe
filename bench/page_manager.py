"""Time of the page manager's operations at the size of a large round.

    python bench/page_manager.py

1,024 sequences of 64 full pages each; every one is forked into one child, and the children are
pruned again: the host work of one round of search with a thousand live hypotheses. The pages of a
sequence lie scattered over the pool, as they do when sequences grow side by side.

How long the histories are should not matter: 64 sequences are forked into 16 children each, which
are pruned again, with 10 pages behind them and with 1,000.

Then, with the prefix cache, as many prompts that have nothing in common: remembered when they are
new and when they are known, found, and attached to empty slots.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

from w2s_fast._pages import PageManager


def measure(
    run: Callable[[], object], undo: Callable[[], object], repetitions: int
) -> tuple[float, float]:
    """Median and minimum time of `run` in milliseconds; `undo` restores the state, untimed."""
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
        undo()
    return statistics.median(times), min(times)


def grown(manager: PageManager, slots: np.ndarray, tokens: int) -> None:
    """Slots of `tokens` tokens, grown side by side a page at a time, in any order."""
    shuffle = np.random.default_rng(0).permutation
    for begin in range(0, tokens, manager.page_size):
        step = np.full(len(slots), min(manager.page_size, tokens - begin), np.int32)
        order = shuffle(slots)
        manager.reserve(order, step)
        manager.extend(order, step)


def fork_and_release(pages: int, page_size: int, repetitions: int) -> tuple[float, float]:
    """Of 16 children of each of 64 slots of so many full pages."""
    manager = PageManager(64 * pages, page_size, 64 * 17, pages)
    slots = manager.allocate(64)
    grown(manager, slots, pages * page_size)
    counts = np.full(64, 16, np.int32)

    def run() -> None:
        children, _ = manager.fork(slots, counts)
        manager.release(children)

    return measure(run, lambda: None, repetitions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--slots", type=int, default=1024)
    parser.add_argument("--pages", type=int, default=64, help="pages a slot")
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--partial", action="store_true", help="leave the last page half full")
    parser.add_argument("--repetitions", type=int, default=2000)
    args = parser.parse_args()

    n, page_size = args.slots, args.page_size
    pages = n * (args.pages + 2)
    manager = PageManager(pages, page_size, 2 * n, args.pages + 1, prefix_cache=True)
    parents = manager.allocate(n)
    tokens = args.pages * page_size - (page_size // 2 if args.partial else 0)
    grown(manager, parents, tokens)
    ones = np.ones(n, np.int32)
    children = np.empty(0, np.int32)

    def fork() -> None:
        nonlocal children
        children, _ = manager.fork(parents, ones)

    results = {}
    results["fork"] = measure(fork, lambda: manager.release(children), args.repetitions)
    fork()
    results["release"] = measure(lambda: manager.release(children), fork, args.repetitions)
    results["reserve"] = measure(
        lambda: manager.reserve(children, ones), lambda: manager.trim(children), args.repetitions
    )
    manager.reserve(children, ones)
    results["places"] = measure(
        lambda: manager.places(children, ones), lambda: None, args.repetitions
    )

    results["page_table"] = measure(
        lambda: manager.page_table(children), lambda: None, args.repetitions
    )

    manager.release(children)
    prompts = np.random.default_rng(1).integers(0, 50_000, n * tokens, np.int32)
    counts = np.full(n, tokens, np.int32)

    def remember() -> None:
        manager.remember(parents, prompts, counts)

    few = min(args.repetitions, 200)
    results["remember, new"] = measure(remember, manager.drop_cache, few)
    remember()
    results["remember, known"] = measure(remember, lambda: None, few)
    results["match"] = measure(lambda: manager.match(prompts, counts), lambda: None, few)
    manager.release(parents)  # the prompts are now in the cache only
    slots = manager.allocate(n)

    def empty() -> None:
        manager.release(slots)
        manager.allocate(n)

    def adopt() -> None:
        manager.adopt(slots, prompts, counts)

    results["adopt"] = measure(adopt, empty, few)
    adopt()
    results["release, cached"] = measure(
        lambda: manager.release(slots), lambda: (manager.allocate(n), adopt()), few
    )

    print(f"{n} slots of {tokens} tokens ({args.pages} pages of {page_size}); ms a call")
    print(f"{'operation':<17}{'median':>9}{'min':>9}")
    for name, (median, least) in results.items():
        print(f"{name:<17}{median:>9.3f}{least:>9.3f}")
    print("64 slots, 16 children each, forked and released")
    for pages in (10, 1000):
        median, least = fork_and_release(pages, page_size, args.repetitions)
        print(f"{f'{pages} pages':<17}{median:>9.3f}{least:>9.3f}")


if __name__ == "__main__":
    main()
