"""What the tests of a page manager share."""

import numpy as np

from w2s_fast._pages import PageManager

PAGE_SIZE = 4


def i32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def pages(manager: PageManager, slot: int) -> list[int]:
    """The pages of a slot, in order."""
    return manager.page_table(i32(slot))[0].tolist()


def state(manager: PageManager) -> tuple:
    """Everything that can be seen from outside."""
    statistics = manager.cache_statistics
    return (
        manager.lengths.tolist(),
        manager.held_pages.tolist(),
        manager.last_pages.tolist(),
        manager.pages_before.tolist(),
        manager.holders.tolist(),
        manager.free_pages,
        manager.free_slots,
        manager.cached_pages,
        statistics.lookups,
        statistics.lookup_tokens,
        statistics.hit_tokens,
        statistics.evictions,
    )
