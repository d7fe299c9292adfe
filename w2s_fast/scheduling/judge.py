"""Judge: runs the caller's scorers and choices, in a thread beside the one that takes steps."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias, TypeVar

import numpy as np

from w2s_fast.errors import RankFailure, ScorerFailure
from w2s_fast.models import Ranks
from w2s_fast.scheduling.news import News
from w2s_fast.scorer import ScoredCandidate, Scorer, WeightedScorer
from w2s_fast.search import Beam, OpenChoice, Request

Describe = Callable[[Request, Beam], ScoredCandidate]
# A choice that counts as long as it is the request's.
Open: TypeAlias = tuple[Request, OpenChoice]
T = TypeVar("T")
_Described: TypeAlias = tuple[OpenChoice, list[ScoredCandidate]]


def without_text(request: Request, beam: Beam) -> ScoredCandidate:
    """A candidate where nobody can decode it."""
    return ScoredCandidate(request.given, None, beam.tokens, beam.finish_reason is not None)


class Judge:
    """Decides open choices: all that were handed over, in one call of each scorer.

    Scorers are called one at a time. What fails for one request is its own error: where a call
    fails, each request's candidates are tried by themselves.

    Attributes:
        decided: choices, in the order in which they were decided. Whoever takes steps deals with
            them, and takes them out.
        news: told of each.
    """

    def __init__(
        self,
        scorers: Sequence[WeightedScorer] = (),
        describe: Describe = without_text,
        ranks: Ranks | None = None,
    ) -> None:
        """``describe``: a candidate as scorers see it. ``ranks``: that take the same decisions:
        rank 0's scorers and choices are called, between two steps and not beside them."""
        self._ranks = ranks
        self._scorers = list(scorers)
        self._describe = describe
        self._handed_over: deque[Open] = deque()
        self._one_at_a_time = threading.Lock()
        self.decided: deque[Open] = deque()
        self.news = News()

    def hand_over(self, choices: Sequence[Open]) -> None:
        """Have these decided. Returns at once, but on one of several ranks."""
        self._handed_over.extend(choices)
        if self._ranks is not None:
            # When a thread is done is not the same on all ranks.
            self._work()
            for _, choice in choices:
                choice.handed_over = True
            return
        threading.Thread(target=self._work, name="w2s-fast scorers", daemon=True).start()
        # Last: who is interrupted before hands them over again, and they are decided once.
        for _, choice in choices:
            choice.handed_over = True

    def _work(self) -> None:
        with self._one_at_a_time:
            taken: dict[Open, None] = {}
            while self._handed_over:
                taken[self._handed_over.popleft()] = None
            # Nobody waits for the round of a request that has ended, or began it again.
            found = [own for own in taken if own[0].choice is own[1] and not own[1].decided]
            try:
                self._decide(found)
            except RankFailure as failure:
                for _, choice in found:
                    choice.error = RankFailure(str(failure))
            except BaseException as error:  # nobody may wait for a thread that is no more
                for _, choice in found:
                    if not choice.decided:
                        choice.error = _failure("a scorer or a choice", error)
            self.decided.extend(found)
        self.news.tell()

    def _decide(self, choices: Sequence[Open]) -> None:
        described: list[_Described] = []
        for request, choice in choices:
            try:
                seen = [self._describe(request, beam) for beam in choice.candidates]
                described.append((choice, seen))
            except Exception as error:  # a tokenizer may raise anything
                choice.error = _failure("decoding the candidates", error)
        for scorer, weight in self._scorers:
            described = self._score(scorer, weight, described)
        for choice, seen in described:
            try:
                choice.kept = self._shared(partial(_chosen, choice, seen))
            except RankFailure:
                raise
            except Exception as error:
                choice.error = _failure("the choice", error)

    def _score(
        self, scorer: Scorer, weight: float, described: list[_Described]
    ) -> list[_Described]:
        """Add a scorer's values; those that it did not fail for."""
        if not described:
            return []
        together = [candidate for _, seen in described for candidate in seen]
        try:
            values = self._shared(partial(_values, scorer, together))
        except RankFailure:
            raise
        except Exception as error:
            if len(described) > 1:
                return [own for one in described for own in self._score(scorer, weight, [one])]
            described[0][0].error = _failure("a scorer", error)
            return []
        begin = 0
        for choice, seen in described:
            with np.errstate(all="ignore"):
                choice.extras += weight * np.array(values[begin : begin + len(seen)])
            begin += len(seen)
            if not np.isfinite(choice.extras).all():
                index = int(np.argmin(np.isfinite(choice.extras)))
                choice.error = ScorerFailure(
                    f"a scorer's value, weighted, of candidate {index} of round {choice.number} is "
                    f"{choice.extras[index]}; allowed: finite numbers"
                )
        return [(choice, seen) for choice, seen in described if choice.error is None]

    def _shared(self, make: Callable[[], T]) -> T:
        """What is made; of several ranks by the first, for all."""
        return make() if self._ranks is None else self._ranks.share(make)


def _chosen(choice: OpenChoice, seen: Sequence[ScoredCandidate]) -> list[int] | None:
    choice.decide(seen)
    return choice.kept


def _values(scorer: Scorer, candidates: Sequence[ScoredCandidate]) -> list[float]:
    values = [float(value) for value in scorer(candidates)]
    if len(values) != len(candidates):
        raise ScorerFailure(f"a scorer gave {len(values)} values for {len(candidates)} candidates")
    return values


def _failure(what: str, error: BaseException) -> ScorerFailure:
    if isinstance(error, ScorerFailure):  # which says all
        return error
    failure = ScorerFailure(f"{what} failed: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
