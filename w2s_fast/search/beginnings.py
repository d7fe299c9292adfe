"""Texts that enter, piece by piece; what several of them begin with is run once.

The prefix cache knows what was run, not what the texts beside are about to run. So of those that
need the same page next, one goes first and remembers it, and the others wait, and find it. Where
they part again in groups, the same is done once more. Nobody holds a page that it would not hold
alone.

How far a text has come is the length of its slot, and nothing else: a slot without tokens has not
begun, and may still take what the prefix cache has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from w2s_fast.cache import Int32Array, Ints, as_int32
from w2s_fast.models import PagedModel


class Advance(NamedTuple):
    """How far S texts came.

    Attributes:
        ready: bool [S], those that stand in their slots; or whose rest the caller runs.
        adopted: int32 [S], tokens that each text found in the cache, where earlier requests or
            another of these texts had left them.
        rows: for each pass that was taken, how many texts it ran.
        left: tokens that may still be run of those that were allowed.
    """

    ready: NDArray[np.bool_]
    adopted: Int32Array
    rows: list[int]
    left: int


def leader_of(
    texts: Sequence[Sequence[int]], found: Ints, begun: Sequence[bool], page_size: int
) -> list[int]:
    """Whom each text waits for: of all that need the same page next, one goes first.

    Args:
        texts: token ids.
        found: how many of its first tokens each text has, or finds in cached pages; the same for
            texts that have not begun and are the same up to there.
        begun: whether it has them already: then it waits for nobody, and is waited for.

    Returns:
        Indices of texts; a text's own where it waits for nobody. Of those that have not begun, and
        wait for nobody, no two need the same page next.
    """
    groups: dict[bytes, list[int]] = {}
    for i, (text, count) in enumerate(zip(texts, found)):
        end = (count // page_size + 1) * page_size
        if end <= len(text):  # a page is the same if everything up to its end is
            groups.setdefault(as_int32(text[:end]).tobytes(), []).append(i)
    leaders = list(range(len(texts)))
    for group in groups.values():
        # The longest, for the others may be its beginnings: these find all of it afterwards.
        first = max(group, key=lambda i: (begun[i], len(texts[i])))
        for i in group:
            leaders[i] = i if begun[i] else first
    return leaders


def advance(
    model: PagedModel,
    slots: Int32Array,
    texts: Sequence[Sequence[int]],
    most: int,
    finishes: Sequence[bool] | None = None,
) -> Advance:
    """Bring texts further that stand in their slots in part, or not at all.

    A piece that makes the model give NaN or infinity is not remembered, and from then on nobody
    goes first. Without a prefix cache nobody does.

    Args:
        slots: int32 [S]. texts: token ids, the most urgent first.
        most: tokens that may be run, in all.
        finishes: for each text, whether the caller runs its rest and one more token, in another
            pass, as soon as ``most`` allows it; but not where others wait for that rest.

    Raises:
        OutOfPages: a pass was not run.
    """
    return _Texts(model, slots, texts, finishes or [False] * len(texts)).advance(most)


def prefill(model: PagedModel, texts: Sequence[Sequence[int]]) -> Int32Array:
    """New slots that hold the texts, int32 [S]; what the prefix cache has is not run again.

    Raises:
        OutOfPages: no slot and no page is held.
    """
    slots = model.pool.allocate(len(texts))
    try:
        while not advance(model, slots, texts, model.max_pass_tokens).ready.all():
            pass
    except BaseException:
        model.pool.release(slots)
        raise
    return slots


class _Texts:
    """Texts of one call of :func:`advance`."""

    def __init__(
        self,
        model: PagedModel,
        slots: Int32Array,
        texts: Sequence[Sequence[int]],
        finishes: Sequence[bool],
    ) -> None:
        self._model = model
        self._slots = slots
        self._texts = texts
        self._finishes = finishes
        self._lengths = np.array([len(text) for text in texts], np.int32)
        self._held = model.pool.lengths(slots)
        self._ready = (self._held == self._lengths) & ~np.array(finishes, bool)
        self._adopted = np.zeros(len(texts), np.int32)
        self._shares = model.pool.manager.prefix_cache

    def advance(self, most: int) -> Advance:
        rows: list[int] = []
        while True:
            near = self._near(most)
            found = self._found(near)
            leaders = self._leaders(near, found)
            awaited = {first for i, first in zip(near, leaders) if first != i}
            counts: dict[int, int] = {}
            ended: list[int] = []
            for i in dict.fromkeys(leaders):  # as urgent as the most urgent of those who wait
                rest = int(self._lengths[i]) - found[i]
                if self._finishes[i] and i not in awaited and rest < most:
                    ended.append(i)
                    most -= rest + 1
                elif rest == 0 and not self._finishes[i]:
                    ended.append(i)
                elif rest > 0 and most > 0:
                    counts[i] = min(rest, most)
                    most -= counts[i]
            if not counts and not ended:
                return Advance(self._ready, self._adopted, rows, most)
            self._adopt([*counts, *ended])
            self._ready[ended] = True
            if counts:
                rows.append(len(counts))
                self._run(counts, awaited)

    def _near(self, most: int) -> list[int]:
        """Those that may have their turn, as long as the cache has nothing of them."""
        left = np.flatnonzero(~self._ready)
        rest = (self._lengths - self._held)[left]
        before: NDArray[np.int64] = np.cumsum(rest, dtype=np.int64) - rest
        near: list[int] = left[before <= most].tolist()
        return near

    def _found(self, near: Sequence[int]) -> dict[int, int]:
        """How many tokens each has, or would find in the cache now."""
        found = {i: int(self._held[i]) for i in near}
        new = [i for i in near if found[i] == 0]
        found.update(zip(new, self._model.pool.match([self._texts[i] for i in new]).tolist()))
        return found

    def _leaders(self, near: Sequence[int], found: dict[int, int]) -> list[int]:
        if not self._shares:
            return list(near)
        begun = [bool(self._held[i]) for i in near]
        texts = [self._texts[i] for i in near]
        first = leader_of(texts, list(found.values()), begun, self._model.pool.page_size)
        return [near[k] for k in first]

    def _adopt(self, which: Sequence[int]) -> None:
        """Give those that have not begun what was found: nothing was run since, so it is there."""
        new = [i for i in which if self._held[i] == 0]
        found = self._model.pool.adopt(self._slots[new], [self._texts[i] for i in new])
        self._held[new] = self._adopted[new] = found

    def _run(self, counts: dict[int, int], awaited: set[int]) -> None:
        which = list(counts)
        before = self._held[which]
        pieces = [self._texts[i][b : b + counts[i]] for i, b in zip(which, before)]
        tokens = [token for piece in pieces for token in piece]
        new = list(counts.values())
        hidden = torch.split(self._model.forward(self._slots[which], tokens, new), new)
        self._held[which] += np.array(new, np.int32)
        whole = [i for i in which if self._held[i] == self._lengths[i]]
        self._ready[[i for i in whole if not self._finishes[i]]] = True
        if self._shares:
            # Others wait for these, or may come before they are whole.
            shown = [k for k, i in enumerate(which) if i in awaited or i not in whole]
            self._remember([(which[k], int(before[k]), hidden[k]) for k in shown])

    def _remember(self, ran: Sequence[tuple[int, int, Tensor]]) -> None:
        """Let others find what was run, if nothing of it is broken.

        ``ran``: texts, how many of their tokens stood before, and the last hidden states behind.
        """
        if not ran:
            return
        finite = torch.stack([hidden.isfinite().all() for _, _, hidden in ran]).tolist()
        self._shares = all(finite)
        pool = self._model.pool
        found = pool.match([self._texts[i] for i, _, _ in ran])
        # Where a page before was broken, it is not found.
        sound = [
            i
            for (i, before, _), fine, count in zip(ran, finite, found)
            if fine and count >= before // pool.page_size * pool.page_size
        ]
        pool.remember(self._slots[sound], [self._texts[i][: self._held[i]] for i in sound])
