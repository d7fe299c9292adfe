"""Drawing: the samples of one round of a search, from where they are asked for until all came."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from w2s_fast.errors import W2SFastError
from w2s_fast.result import Draw, Sample


class Ask(NamedTuple):
    """What one hypothesis goes on with.

    Attributes:
        behind: the response so far. samples: how many. max_tokens: of each.
        seed: of the first request that is sent for it.
    """

    behind: str
    samples: int
    max_tokens: int
    seed: int


class Given(NamedTuple):
    """What came for an ask: as many samples, or why there are fewer."""

    samples: list[Sample]
    ended: str | None = None


class Drawing:
    """A round that is being drawn. Whoever draws fills it in, once; others look at ``complete``.

    Attributes:
        number: of the round, from 1. asks: in the order of its hypotheses.
        complete: whether everything has come that will.
        given: for each of ``asks``. error: in their place.
        seconds: that it took.
        taken: whether the round's candidates have their texts. Then of each: ``tokens`` that its
            whole response has, and which of them are ``dropped``: nothing came for them.
    """

    def __init__(self, number: int, asks: Sequence[Ask]) -> None:
        self.number = number
        self.asks = list(asks)
        self.complete = False
        self.given: list[Given] = []
        self.error: W2SFastError | None = None
        self.seconds = 0.0
        self.taken = False
        self.tokens: list[int] = []
        self.dropped: set[int] = set()
        self._begin = time.perf_counter()
        self._cancel: Callable[[], object] | None = None

    def begin(self, cancel: Callable[[], object]) -> None:
        """It is under way; ``cancel`` ends that, from any thread."""
        self._cancel = cancel

    def fill(self, given: Sequence[Given] = (), error: W2SFastError | None = None) -> None:
        """All has come, or an error did."""
        self.given, self.error = list(given), error
        self.seconds = time.perf_counter() - self._begin
        self.complete = True  # last: from here on others look

    def cancel(self) -> None:
        """Nobody waits for it any longer."""
        if self._cancel is not None and not self.complete:
            self._cancel()

    def recorded(self) -> list[Draw]:
        """What was asked and came, for a trace."""
        return [
            Draw(ask.behind, ask.max_tokens, ask.seed, list(given.samples), given.ended)
            for ask, given in zip(self.asks, self.given)
        ]
