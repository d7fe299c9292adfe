"""Beams: hypotheses and candidates, and which slots they hold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from w2s_fast.cache import Int32Array
from w2s_fast.result import FinishReason

NO_SLOT = -1
NO_GUIDE_SLOTS: Int32Array = np.empty((0, 2), np.int32)


@dataclass
class Beam:
    """A hypothesis (after a selection) or a candidate (before it).

    Every model's KV holds the prompt and ``tokens`` without the last one; a finished beam holds
    no slot, since nothing will be appended to it.

    Attributes:
        parent: index of its parent among the kept of the round before; None in round 1.
        inherited: how many of its tokens it has from its parent, in common with its siblings.
        index: its own index among the candidates of its round: the key of its noise.
        tokens: the whole response so far.
        logprobs: the base's log-prob of each token, at temperature 1.
        token_scores: each token's weighted log-ratio, added over the guides; shorter than
            ``tokens`` by those not scored yet, and empty where no guide runs.
        total: sum of the token scores, as the selection computed it.
        slot: in the base's pool, or NO_SLOT.
        guide_slots: int32 [guides, 2] (tuned, untuned), or NO_GUIDE_SLOTS.
    """

    parent: int | None
    inherited: int
    index: int
    tokens: list[int]
    logprobs: list[float]
    token_scores: list[float]
    finish_reason: FinishReason | None
    total: float = 0.0
    slot: int = NO_SLOT
    guide_slots: Int32Array = field(default_factory=lambda: NO_GUIDE_SLOTS)

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def child(self, parent: int | None, index: int) -> Beam:
        """A candidate with the same tokens; it has no slots yet."""
        return Beam(
            parent,
            len(self.tokens),
            index,
            list(self.tokens),
            list(self.logprobs),
            list(self.token_scores),
            self.finish_reason,
            self.total,
        )


def forget_slots(beams: Iterable[Beam]) -> None:
    """They hold none any longer; whether these are given back is the caller's to know."""
    for beam in beams:
        beam.slot, beam.guide_slots = NO_SLOT, NO_GUIDE_SLOTS


@dataclass
class Family:
    """A beam at the start of a round, and the candidates that come from it."""

    parent: Beam
    children: list[Beam]
