"""Pace: how fast an engine samples for a command, and how long the rest will take."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from w2s_fast.params import SearchParams

if TYPE_CHECKING:
    from w2s_fast.result import Usage
    from w2s_fast.stats import EngineStats


class Pace:
    """From what an engine counts, step by step.

    Before an answer has come, all are taken to be as long as they may be; afterwards, as long as
    those are on average. Of a single one, the rounds that are left are counted, too: candidates
    that have ended take part in them without sampling. Between two steps nothing is counted, so all
    is measured at the last one, and time runs down from there.
    """

    def __init__(self, stats: Callable[[], EngineStats], total: int | None) -> None:
        """Of an engine that does nothing else. ``total``: of answers; None: nobody knows."""
        self._stats = stats
        self._total = total
        self._begin = time.perf_counter()
        before = stats()
        self._sampled_before, self._rounds_before = before.sampled_tokens, before.rounds
        self._most = self._known = 0  # tokens of all whose parameters are known, and their number
        self._most_rounds: int | None = None  # of the last of them
        self._answered = self._failed = self._in_answers = 0
        self._seen, self._seen_at = 0, self._begin  # sampled tokens, and when they became so many

    def expect(self, params: SearchParams) -> None:
        """A request with these parameters is to be answered."""
        self._most += most_sampled(params)
        self._most_rounds = most_rounds(params)
        self._known += 1

    def answered(self, usage: Usage) -> None:
        self._answered += 1
        self._in_answers += usage.sampled_tokens

    def failed(self) -> None:
        self._failed += 1

    @property
    def round(self) -> int:
        """The one under way, of a single request, or its last one."""
        number = self._rounds + 1
        return number if self._most_rounds is None else min(number, self._most_rounds)

    @property
    def tokens_per_s(self) -> float:
        """Sampled tokens, discarded candidates' included, in a second of wall clock."""
        sampled, seconds = self._look()
        return sampled / seconds if seconds else 0.0

    @property
    def seconds_left(self) -> float | None:
        """None as long as nothing is sampled, or nobody knows how much is to come."""
        sampled, seconds = self._look()
        if self._total is None or not sampled or not self._known:
            return None
        each = self._in_answers / self._answered if self._answered else self._most / self._known
        waiting = self._total - self._answered - self._failed
        rest = max(0.0, waiting * each - (sampled - self._in_answers)) / sampled
        if self._total == 1 and self._most_rounds is not None and (rounds := self._rounds):
            rest = min(rest, max(0, self._most_rounds - rounds) / rounds)
        return max(0.0, rest * seconds - (time.perf_counter() - self._begin - seconds))

    @property
    def _rounds(self) -> int:
        return self._stats().rounds - self._rounds_before

    def _look(self) -> tuple[int, float]:
        """Tokens sampled so far, and the seconds from the beginning until they were."""
        sampled = self._stats().sampled_tokens - self._sampled_before
        if sampled != self._seen:
            self._seen, self._seen_at = sampled, time.perf_counter()
        return self._seen, self._seen_at - self._begin


def most_sampled(params: SearchParams) -> int:
    """Tokens that a request samples at most, of all candidates together."""
    if params.widths.ragged:
        return params.rows * params.max_new_tokens
    found = 0
    for shape in params.widths.shapes():
        left = params.max_new_tokens - shape.before
        found += shape.rows * (left if shape.repeats else shape.chunk)
    return found


def most_rounds(params: SearchParams) -> int | None:
    """Selections of a request at most; None: as many as its chunks come to."""
    if params.widths.ragged:
        return None
    found = 0
    for shape in params.widths.shapes():
        left = params.max_new_tokens - shape.before
        found += -(-left // shape.chunk) if shape.repeats else 1
    return found


def clock(seconds: float) -> str:
    """As 0:07, 12:34 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
