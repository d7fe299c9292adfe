"""The pages of one model: who holds which (csrc's PageManager) and what stands in them (kv).

The idea of paged KV with reference counts and copy-on-write is vLLM's PagedAttention
(arXiv 2309.06180); the one-tensor layout lets a page be copied in all layers at once. Pages that
outlive their request and are found again by their tokens are vLLM's automatic prefix caching.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from w2s_fast._pages import CacheStatistics, PageManager
from w2s_fast.cache.integers import Int32Array, Ints, as_int32, ragged_int32
from w2s_fast.errors import PageMisuse
from w2s_fast.kernels.copy_pages import copy_pages


class PagePool:
    """The paged KV cache of one model.

    A slot is one sequence. A round of decoding reads::

        pool.reserve(slots, tokens)                # pages exist, and are this slot's own
        where = pool.places(slots, tokens)   # where the new tokens go
        ...                                        # the model writes keys and values there
        pool.extend(slots, tokens)                 # now they count
        children = pool.fork(slots, counts)        # survivors multiply
        pool.release(losers)                       # a pruned page is free again

    `slots`, `tokens`, `counts` are one-dimensional lists or integer arrays of one length, without
    repeated slots. Every operation is all-or-nothing: it raises `OutOfPages` (too few free pages
    or slots) or `PageMisuse` (a call that makes no sense) and then nothing has changed.

    With `prefix_cache`, a prompt that begins like an earlier one need not be computed again::

        found = pool.adopt(slots, prompts)      # tokens of each prompt that slots have already
        ...                                     # reserve, write and extend the rest
        pool.remember(slots, prompts)           # for prompts to come

    Cached pages that no slot holds count as free, and are taken, least recently used first, when
    no other page is left. They are never written: a slot that was rolled back into one gets a
    copy. Without `prefix_cache` the same calls find nothing and keep nothing.

    Attributes:
        kv: [layers, 2, num_pages, page_size, num_kv_heads, head_dim]; index 0 of the second
            dimension is keys, 1 is values. It is not initialised: **positions never written hold
            garbage, NaN included**, so a reader masks by length and must not multiply garbage by
            zero. Memory is only touched where tokens are written.
        manager: the page manager; `manager.lengths` and others are live read-only views.
    """

    def __init__(
        self,
        layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_pages: int,
        page_size: int,
        max_slots: int,
        max_tokens_per_slot: int,
        dtype: torch.dtype,
        device: torch.device | str,
        prefix_cache: bool = False,
    ) -> None:
        """A pool of `num_pages` pages of `page_size` tokens for at most `max_slots` sequences.

        A sequence may have `max_tokens_per_slot` tokens, rounded up to whole pages.
        PageMisuse if a size is not positive.
        """
        max_pages_per_slot = -(-max_tokens_per_slot // page_size) if page_size > 0 else 0
        self.manager = PageManager(
            num_pages, page_size, max_slots, max_pages_per_slot, prefix_cache
        )
        self.kv = torch.empty(
            (layers, 2, num_pages, page_size, num_kv_heads, head_dim), dtype=dtype, device=device
        )
        self._cache_aside = False
        self.num_pages = num_pages
        self.page_size = page_size
        self.max_tokens_per_slot = max_pages_per_slot * page_size
        self.bytes_per_token = layers * 2 * num_kv_heads * head_dim * self.kv.element_size()
        # The views share the manager's memory; making one costs more than reading it.
        self._lengths = self.manager.lengths
        self._held = self.manager.held_pages

    @property
    def device(self) -> torch.device:
        return self.kv.device

    @property
    def free_pages(self) -> int:
        """Pages that can be had, cached ones that no slot holds included."""
        return self.manager.free_pages

    @property
    def free_slots(self) -> int:
        return self.manager.free_slots

    def allocate(self, n: int) -> Int32Array:
        """`n` new empty slots, int32 [n]. OutOfPages if there are not so many."""
        return self.manager.allocate(n)

    def pages_needed(self, slots: Ints, tokens: Ints) -> int:
        """How many free pages `reserve` with the same arguments would take."""
        return self.manager.pages_needed(as_int32(slots), as_int32(tokens))

    def reserve(self, slots: Ints, tokens: Ints) -> None:
        """Makes room for `tokens[i]` more tokens in `slots[i]`.

        A partial last page that others share is first replaced by a copy.
        """
        self.copy_pages(self.manager.reserve(as_int32(slots), as_int32(tokens)))

    def places(self, slots: Ints, tokens: Ints) -> torch.Tensor:
        """Where the next `tokens[i]` tokens of `slots[i]` go, slot after slot.

        Returns int64 [sum(tokens)] on the pool's device: page * page_size + offset, that is, an
        index into `kv[layer, 0].view(num_pages * page_size, num_kv_heads, head_dim)`. To be
        called after `reserve` and before `extend`; PageMisuse if the room is not reserved.
        """
        positions = self.manager.places(as_int32(slots), as_int32(tokens))
        return torch.from_numpy(positions).to(self.device, non_blocking=True)

    def extend(self, slots: Ints, tokens: Ints) -> None:
        """Counts `tokens[i]` tokens as written. PageMisuse if they were not reserved."""
        self.manager.extend(as_int32(slots), as_int32(tokens))

    def fork(self, slots: Ints, counts: Ints) -> Int32Array:
        """`counts[i]` new slots with the tokens of `slots[i]`; the parent stays as it is.

        Full pages are shared, a partial last page is copied for each child. Returns
        int32 [sum(counts)], grouped by parent.
        """
        children, copies = self.manager.fork(as_int32(slots), as_int32(counts))
        self.copy_pages(copies)
        return children

    def truncate(self, slots: Ints, lengths: Ints) -> None:
        """Rolls `slots[i]` back to `lengths[i]` tokens; pages beyond, reserved ones too, go."""
        self.manager.truncate(as_int32(slots), as_int32(lengths))

    def trim(self, slots: Ints) -> None:
        """Gives up pages reserved beyond the length."""
        self.manager.trim(as_int32(slots))

    def release(self, slots: Ints) -> None:
        """Gives up the slots, and the pages that nobody else holds."""
        self.manager.release(as_int32(slots))

    def release_others(self, slots: Ints) -> None:
        """Gives up every slot but these. PageMisuse if one of these is not in use."""
        kept = self._live(slots)
        self.release(np.setdiff1d(np.flatnonzero(self._held >= 0), kept))

    def match(self, prompts: Sequence[Ints]) -> Int32Array:
        """How many tokens of each prompt `adopt` would find, int32 [len(prompts)].

        Changes nothing; it does not count as a use of the pages either.
        """
        if self._cache_aside:
            return np.zeros(len(prompts), np.int32)
        return self.manager.match(*ragged_int32(prompts))

    def adopt(self, slots: Ints, prompts: Sequence[Ints]) -> Int32Array:
        """Gives empty slots the cached pages that `prompts[i]` begins with.

        Returns int32 [len(slots)]: how many tokens `slots[i]` has now, a multiple of the page
        size. It may be the whole prompt: who needs the last token's hidden state passes
        `prompt[:-1]`. No page is taken, so there is no OutOfPages; PageMisuse if a slot holds
        pages. Pages that counted as free may no longer do so.
        """
        if self._cache_aside:
            return np.zeros(len(prompts), np.int32)
        return self.manager.adopt(as_int32(slots), *ragged_int32(prompts))

    def remember(self, slots: Ints, prompts: Sequence[Ints]) -> int:
        """Caches the full pages of `prompts[i]`, the tokens that `slots[i]` begins with.

        To be called when the tokens are written (after `extend`). Whether they are the tokens
        that stand in the slot is the caller's to know; PageMisuse if the slot is shorter.

        Where another slot's page with the same beginning is cached already, that one stays, the
        slot keeps its own, and its further pages are not cached. So of prompts with a common
        beginning that are computed side by side, the whole of the first and only the beginning of
        the others is found later; computed one after the other, all are cached whole.

        Returns the number of pages that are new in the cache.
        """
        if self._cache_aside:
            return 0
        return self.manager.remember(as_int32(slots), *ragged_int32(prompts))

    @contextmanager
    def without_cache(self) -> Iterator[None]:
        """Within, the prefix cache finds nothing, is given nothing and counts nothing.

        Pages that it holds may still be taken, as always.
        """
        before, self._cache_aside = self._cache_aside, True
        try:
            yield
        finally:
            self._cache_aside = before

    def drop_cache(self) -> None:
        """Empties the prefix cache; slots keep what they hold. For when the model changes."""
        self.manager.drop_cache()

    @property
    def cached_pages(self) -> int:
        return self.manager.cached_pages

    @property
    def cache_statistics(self) -> CacheStatistics:
        """Lookups, their tokens, tokens found and pages evicted since the pool was made."""
        return self.manager.cache_statistics

    def lengths(self, slots: Ints) -> Int32Array:
        """Tokens in each slot, int32 [len(slots)], on the host: a copy, not a view."""
        return self._lengths[self._live(slots)]

    def page_table(self, slots: Ints) -> torch.Tensor:
        """The pages of `slots`, int32 [len(slots), M] on the pool's device.

        M is the largest number of pages that one of them holds, pages reserved ahead included, so
        a table made after `reserve` serves until the reserved room is full. Shorter rows end
        in -1.
        """
        table = torch.from_numpy(self.manager.page_table(as_int32(slots)))
        return table.to(self.device, non_blocking=True)

    def copy_pages(self, copies: Int32Array) -> None:
        """Copies the contents of pages, in all layers. `copies`: int32 [c, 2], (from, to)."""
        if len(copies) > 0:
            pairs = torch.from_numpy(np.ascontiguousarray(copies))
            copy_pages(self.kv, pairs.to(self.device, non_blocking=True))

    def _live(self, slots: Ints) -> Int32Array:
        rows = as_int32(slots)
        inside = (rows >= 0) & (rows < len(self._held))
        if not inside.all() or (self._held[rows] < 0).any():
            raise PageMisuse(f"not all of these slots are in use: {rows.tolist()}")
        return rows
