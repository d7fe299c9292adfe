"""Scorer: what values partial responses beside the guides, or in their place."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

from w2s_fast.errors import InvalidRequest


@dataclass(frozen=True)
class ScoredCandidate:
    """A candidate of a round, as a scorer or a choice sees it.

    Attributes:
        prompt: as the caller gave it: a string, token ids, messages, or a :class:`w2s_fast.Chat`.
        text: the response so far, without special tokens; None if the engine has no tokenizer.
        token_ids: the response so far, an EOS or stop token that ends it included.
        finished: whether it has ended; else it can still grow.
    """

    prompt: Any
    text: str | None
    token_ids: list[int]
    finished: bool


class Scorer(Protocol):
    """Anything that can be called like this: a function, or an object with ``__call__``.

    It is called in a thread of its own, one call at a time, and may take as long as it likes:
    requests that do not wait for it go on. It must not wait for the engine that calls it. What it
    raises, and what is no finite number for each candidate, is the error of the request whose
    candidates it is raised for: :class:`w2s_fast.errors.ScorerFailure`.
    """

    def __call__(self, candidates: Sequence[ScoredCandidate], /) -> Sequence[float]:
        """A value for each candidate, of its whole text so far; the larger, the better.

        Args:
            candidates: of the rounds of one or more requests, one after the other. What it says of
                one must not depend on the others, or a request is no longer answered alone as it
                is among others.
        """


# Which candidates of a round are kept, best first: given the value of each, and the candidates. An
# index that comes more than once makes as many hypotheses. Called in the thread of the scorers.
Choice: TypeAlias = Callable[[Sequence[float], Sequence[ScoredCandidate]], Sequence[int]]


class WeightedScorer(NamedTuple):
    """A scorer, and the factor of its values."""

    scorer: Scorer
    weight: float = 1.0


def with_weights(scorers: Sequence[Scorer | tuple[Scorer, float]]) -> list[WeightedScorer]:
    """Scorers, alone or as (scorer, weight).

    Raises:
        InvalidRequest: they are no sequence, one cannot be called, or a weight is no finite number.
    """
    if not isinstance(scorers, Sequence):
        raise InvalidRequest(f"scorers is {scorers!r}; allowed: a sequence of scorers")
    found = []
    for given in scorers:
        pair = given if isinstance(given, tuple) else (given, 1.0)
        if len(pair) != 2 or not callable(pair[0]):
            raise InvalidRequest(f"a scorer is {given!r}; allowed: a callable, or (it, weight)")
        scorer, weight = pair
        if isinstance(weight, bool) or not (
            isinstance(weight, (int, float)) and math.isfinite(weight)
        ):
            raise InvalidRequest(f"weight of a scorer is {weight!r}; allowed: a number")
        found.append(WeightedScorer(scorer, weight))
    return found
