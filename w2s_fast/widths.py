"""How wide and how long the rounds of a search are, by their number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

_Value = TypeVar("_Value")


class RoundShape(NamedTuple):
    """The most that a round can have.

    Attributes:
        hypotheses: that it goes on from; 1 in the first round, which goes on from the prompt.
        rows: candidates that grow.
        kept: of its candidates.
        before: tokens that each of its hypotheses has, at least; ``chunk``: that a candidate grows
            by, at most.
        repeats: all later rounds are like this one, but for ``before``; else nobody has more
            tokens than when it ends, or another shape follows.
        exact: each hypothesis has just as many tokens as ``before`` says, in every such round.
    """

    hypotheses: int
    rows: int
    kept: int
    before: int
    chunk: int
    repeats: bool
    exact: bool


class Widths(NamedTuple):
    """The rounds of a search; each sequence has an entry a round, and the last one goes on.

    Attributes:
        first_candidates: sampled from the prompt, in round 1.
        kept: W. successors: K, from round 2 on; its first entry is part of ``first_candidates``.
        chunks: L, at most ``max_new_tokens``.
        max_new_tokens: of a response.
        copies: a candidate may be kept more than once.
        ragged: chunks may end before their full lengths, each on its own.
    """

    first_candidates: int
    kept: tuple[int, ...]
    successors: tuple[int, ...]
    chunks: tuple[int, ...]
    max_new_tokens: int
    copies: bool = False
    ragged: bool = False

    def width_in(self, number: int) -> int:
        """W of a round, counted from 1."""
        return in_round(self.kept, number)

    def shapes(self) -> Iterator[RoundShape]:
        """Of all rounds there can be, up to the first one that repeats."""
        entries = max(len(self.kept), len(self.successors), len(self.chunks))
        number, hypotheses, before = 1, 1, 0
        while before < self.max_new_tokens:
            chunk = min(in_round(self.chunks, number), self.max_new_tokens - before)
            first = number == 1
            rows = (
                self.first_candidates if first else hypotheses * in_round(self.successors, number)
            )
            width = self.width_in(number)
            kept = width if self.copies else min(width, rows)
            grown = 1 if self.ragged else chunk
            last = before + grown == self.max_new_tokens
            repeats = number >= max(entries, 2) and kept == hypotheses and not last
            exact = first or not (repeats or self.ragged)
            yield RoundShape(hypotheses, rows, kept, before, chunk, repeats, exact)
            if repeats:
                return
            number, hypotheses, before = number + 1, kept, before + grown


def by_round(value: Any) -> tuple[Any, ...]:
    """One value for all rounds, or one for each, as the latter."""
    return value if isinstance(value, tuple) else (value,)


def in_round(values: tuple[_Value, ...], number: int) -> _Value:
    """The entry of a round, counted from 1."""
    return values[min(number, len(values)) - 1]
