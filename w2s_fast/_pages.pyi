"""Types of the compiled module; csrc/page_manager.h says what each operation does.

Every array is one-dimensional unless a shape is given; arguments must be contiguous int32 arrays
(anything else is a TypeError). Operations raise PageMisuse or OutOfPages and then change nothing.
"""

from collections.abc import Callable
from threading import Lock

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]

class Hold:
    """A lock held for a block, whatever interrupts it; csrc/hold.h says what the arguments are."""

    def __init__(
        self,
        lock: Lock,
        *,
        queue: Lock | None = None,
        wait: bool = True,
        begin: Callable[[], object] | None = None,
        end: Callable[[BaseException | None], object] | None = None,
        after: Callable[[], object] | None = None,
    ) -> None: ...
    def __enter__(self) -> bool:
        """Whether the lock is held: always, if it was to be waited for."""
    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None: ...

class CacheStatistics:
    @property
    def lookups(self) -> int:
        """Prompts that adopt was asked for."""
    @property
    def lookup_tokens(self) -> int:
        """Tokens of these prompts."""
    @property
    def hit_tokens(self) -> int:
        """Those of them that adopt attached."""
    @property
    def evictions(self) -> int:
        """Cached pages taken for something else."""

class PageManager:
    def __init__(
        self,
        num_pages: int,
        page_size: int,
        max_slots: int,
        max_pages_per_slot: int,
        prefix_cache: bool = False,
        hash_bits: int = 64,
    ) -> None: ...
    def allocate(self, n: int) -> Int32: ...
    def reserve(self, slots: Int32, tokens: Int32) -> Int32:
        """Returns page copies, int32 [c, 2]: (source, destination)."""
    def pages_needed(self, slots: Int32, tokens: Int32) -> int: ...
    def places(self, slots: Int32, tokens: Int32) -> NDArray[np.int64]: ...
    def extend(self, slots: Int32, tokens: Int32) -> None: ...
    def fork(self, slots: Int32, counts: Int32) -> tuple[Int32, Int32]:
        """Returns the children, grouped by parent, and page copies as reserve does."""
    def truncate(self, slots: Int32, lengths: Int32) -> None: ...
    def trim(self, slots: Int32) -> None: ...
    def release(self, slots: Int32) -> None: ...
    def match(self, tokens: Int32, counts: Int32) -> Int32:
        """Returns how many tokens of each sequence are cached."""
    def adopt(self, slots: Int32, tokens: Int32, counts: Int32) -> Int32:
        """Returns how many tokens each slot was given."""
    def remember(self, slots: Int32, tokens: Int32, counts: Int32) -> int:
        """Returns how many pages are new in the cache."""
    def drop_cache(self) -> None: ...
    def check(self) -> None:
        """Walks everything; RuntimeError names the broken rule."""
    @property
    def num_pages(self) -> int: ...
    @property
    def page_size(self) -> int: ...
    @property
    def max_slots(self) -> int: ...
    @property
    def max_pages_per_slot(self) -> int: ...
    @property
    def prefix_cache(self) -> bool: ...
    @property
    def cached_pages(self) -> int: ...
    @property
    def cache_statistics(self) -> CacheStatistics:
        """As of now; it does not change later."""
    @property
    def free_pages(self) -> int:
        """Cached pages that no slot holds included."""
    @property
    def used_pages(self) -> int: ...
    @property
    def free_slots(self) -> int: ...
    @property
    def page_table(self) -> Int32:
        """Read-only live view [max_slots, max_pages_per_slot]; -1 = no page."""
    @property
    def lengths(self) -> Int32:
        """Read-only live view [max_slots]."""
    @property
    def held_pages(self) -> Int32:
        """Read-only live view [max_slots]: pages held, reserved ones too; -1 = free slot."""
    @property
    def reference_counts(self) -> Int32:
        """Read-only live view [num_pages]: the slots with the page, plus one if it is cached."""

class PassLayout:
    """One forward pass, laid out for the attention kernels; see csrc/plan.h."""

    def __init__(
        self,
        pages: PageManager,
        slots: Int32,
        counts: Int32,
        first: Int32,
        count: Int32,
        begin: Int32,
        end: Int32,
        own: Int32,
        split_keys: int,
        split_queries: int,
        ahead: int = 0,
    ) -> None: ...
    @property
    def bounds(self) -> tuple[int, int, int, int, int, int, int, int, int]:
        """rows, tokens, splits, pages, max_q, max_k, max_own, max_tokens, max_parts."""
    def write(
        self,
        buffer: NDArray[np.uint8],
        offsets: NDArray[np.int64],
        rows: int,
        tokens: int,
        splits: int,
        pages: int,
        back: bool = False,
    ) -> None:
        """Fill a buffer with room for so many; ``offsets``: of the fields in PassField's order."""
