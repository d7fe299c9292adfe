"""Texts that enter together and begin alike: what they share is run once.

The prefix cache knows what earlier requests ran, not what the requests of the same step are about
to run. So before all of them are run side by side, some go first: of those that need the same page
next, one runs its whole text and remembers it, and the others find its pages. Where they part again
in groups, the same is done once more. Nobody holds a page that it would not hold alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from w2s_fast.cache import Int32Array, Ints, as_int32
from w2s_fast.models import PagedModel


class Begun(NamedTuple):
    """Slots that hold some first pages of their texts, or all of a text that went first.

    Attributes:
        slots: int32 [S].
        adopted: int32 [S], tokens that each text found in the cache, where earlier requests or
            another of these texts had left them.
        rows: for each pass that was taken, how many texts it ran.
    """

    slots: Int32Array
    adopted: Int32Array
    rows: list[int]


def leaders(texts: Sequence[Sequence[int]], found: Ints, page_size: int) -> list[int]:
    """Who goes first: of all texts that need the same page next, the longest.

    Args:
        texts: token ids.
        found: how many of its first tokens stand in cached pages already, for each text: a
            multiple of ``page_size``, and the same for texts that are the same up to there.

    Returns:
        Indices of texts, none where no two texts need the same page next. No two leaders share a
        page that is not cached yet.
    """
    groups: dict[bytes, list[int]] = {}
    for i, (text, begin) in enumerate(zip(texts, found)):
        end = begin + page_size
        if end <= len(text):  # a page is the same if everything up to its end is
            groups.setdefault(as_int32(text[:end]).tobytes(), []).append(i)
    # The longest, for the others may be its beginnings: these find all of it in the next pass.
    return [max(group, key=lambda i: len(texts[i])) for group in groups.values() if len(group) > 1]


def begin(model: PagedModel, texts: Sequence[Sequence[int]]) -> Begun:
    """New slots that hold what the prefix cache has of each text.

    Before that, what several texts begin with is run and cached: afterwards no two texts need the
    same full page. A text that makes the model give NaN or infinity is not remembered, and from
    then on nobody goes first. Without a prefix cache the slots are empty.

    Raises:
        OutOfPages: no slot and no page is held.
    """
    pool = model.pool
    slots = pool.allocate(len(texts))
    adopted = np.zeros(len(texts), np.int32)
    rows: list[int] = []
    waiting = list(range(len(texts)))

    def of(which: Sequence[int]) -> list[Sequence[int]]:
        return [texts[i] for i in which]

    def adopt(which: Sequence[int]) -> None:
        adopted[which] = pool.adopt(slots[which], of(which))

    try:
        sound = pool.manager.prefix_cache
        while sound:
            found = pool.match(of(waiting))
            first = [waiting[i] for i in leaders(of(waiting), found, pool.page_size)]
            if not first:
                break
            # What a follower finds its leader holds, too, so nothing of it is evicted meanwhile.
            adopt(first)
            hidden = _run_rest(model, slots[first], of(first))
            finite = torch.stack([own.isfinite().all() for own in hidden]).tolist()
            whole = [i for i, fine in zip(first, finite) if fine]
            pool.remember(slots[whole], of(whole))
            sound = all(finite)
            waiting = [i for i in waiting if i not in first]
            rows.append(len(first))
        adopt(waiting)
    except BaseException:
        pool.release(slots)
        raise
    return Begun(slots, adopted, rows)


def prefill(model: PagedModel, texts: Sequence[Sequence[int]]) -> Int32Array:
    """New slots that hold the texts, int32 [S]; what the prefix cache has is not run again.

    Raises:
        OutOfPages: no slot and no page is held.
    """
    slots = begin(model, texts).slots
    try:
        _run_rest(model, slots, texts)
    except BaseException:
        model.pool.release(slots)
        raise
    return slots


def _run_rest(
    model: PagedModel, slots: Int32Array, texts: Sequence[Sequence[int]]
) -> Sequence[Tensor]:
    """Run what the slots do not hold of their texts: last hidden states [., D], for each text."""
    rest = [text[held:] for text, held in zip(texts, model.pool.lengths(slots))]
    rows = [i for i, tokens in enumerate(rest) if tokens]
    if not rows:
        return []
    counts = [len(rest[i]) for i in rows]
    tokens = torch.tensor([token for i in rows for token in rest[i]], device=model.device)
    return torch.split(model.forward(slots[rows], tokens, counts), counts)
