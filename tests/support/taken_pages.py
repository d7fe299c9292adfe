"""Pages of a pool that somebody else has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from w2s_fast.cache import PagePool


@contextmanager
def all_taken_but(pool: PagePool, pages: int) -> Iterator[None]:
    """All that a request can hold are so many pages, those that it holds included."""
    slots, left = [], pool.num_pages - pages
    while left > 0:
        slots += pool.allocate(1).tolist()
        own = min(left, pool.max_tokens_per_slot // pool.page_size)
        pool.reserve(slots[-1:], [own * pool.page_size])
        left -= own
    yield
    pool.release(slots)
