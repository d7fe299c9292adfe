"""The choice of a round's survivors where the host makes it: with scorers, or by another rule.

The guides' scores come from the selection all the same; what it would have kept is not looked at.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from w2s_fast._pages import Beam
from w2s_fast.errors import ScorerFailure, W2SFastError
from w2s_fast.kernels.noise import seed_bits, uniform_of_round
from w2s_fast.params import SearchParams
from w2s_fast.scorer import ScoredCandidate


class OpenChoice:
    """A round of one request whose candidates are complete, until it is known who is kept.

    A copy of all that is needed, so that another thread may decide while steps are taken. It counts
    as long as it is its request's ``choice``: a round that begins again has another one.

    Attributes:
        candidates: of the round, [C].
        extras: float64 [C], what others than the guides say of each, weighted: to be filled in.
        kept: indices of candidates, best first; None as long as it is not decided.
        error: why it cannot be decided.
        handed_over: whether somebody is about to decide.
    """

    def __init__(
        self,
        params: SearchParams,
        number: int,
        candidates: Sequence[Beam],
        scores: Sequence[float],
        dropped: Collection[int] = (),
    ) -> None:
        """``number``: of the round, from 1. ``scores``: the guides', [C]; zeros without guides.
        ``dropped``: indices of candidates that count for nothing, not all of them."""
        self.candidates = candidates
        self._eligible = np.array([i for i in range(len(candidates)) if i not in dropped], np.intp)
        self.width = params.widths.width_in(number)
        self.number = number
        self.extras = np.zeros(len(candidates))
        self.kept: list[int] | None = None
        self.error: W2SFastError | None = None
        self.handed_over = False
        self._params = params
        self._scores = np.array(scores, np.float64)

    @property
    def decided(self) -> bool:
        return self.kept is not None or self.error is not None

    def decide(self, seen: Sequence[ScoredCandidate] = ()) -> None:
        """Choose who is kept, by the request's parameters; ``seen``: for a callable.

        Raises:
            ScorerFailure: it gave what are no indices. What it raises itself is passed on.
        """
        params, values = self._params, self._scores + self.extras
        eligible = self._eligible
        if callable(params.selection):
            own = [seen[i] for i in eligible]
            chosen = self._indices(params.selection(values[eligible].tolist(), own))
            self.kept = eligible[chosen].tolist()
            return
        if params.dedup:
            tokens = [self.candidates[i].tokens for i in eligible]
            eligible = eligible[_first_of_equals(tokens)]
        if params.selection == "top":
            order = ranked(values[eligible])[: self.width]
        else:
            uniform = uniform_of_round(seed_bits(params.seed), self.number)
            order = resampled(values[eligible], self.width, params.tau, uniform)
        self.kept = eligible[order].tolist()

    def _indices(self, given: Sequence[int]) -> list[int]:
        try:
            indices = [operator.index(index) for index in given]
        except TypeError as error:
            raise ScorerFailure(f"the choice gave {given!r}; allowed: indices") from error
        count = len(self._eligible)
        if not 1 <= len(indices) <= self.width or not all(0 <= i < count for i in indices):
            raise ScorerFailure(
                f"the choice of round {self.number} gave {indices}; allowed: 1 to {self.width} "
                f"indices below {count}"
            )
        return indices


def ranked(values: NDArray[np.float64]) -> NDArray[np.intp]:
    """Indices of values [C], the largest first; equal ones in their order, broken ones last."""
    return np.argsort(np.where(np.isfinite(values), -values, np.inf), kind="stable")


def resampled(
    values: NDArray[np.float64], width: int, tau: float, uniform: float
) -> NDArray[np.intp]:
    """Systematic resampling: ``width`` indices of values [C], with weights softmax(value / tau).

    The points (uniform + i) / width each draw the candidate in whose share of [0, 1) they lie.
    Ordered as :func:`ranked`, so that copies of a candidate stand together.
    """
    with np.errstate(over="ignore", under="ignore"):  # those far behind have no share
        weights = np.exp((values - values.max()) / tau)
    shares = np.cumsum(weights)
    points = (uniform + np.arange(width)) / width * shares[-1]
    drawn: NDArray[np.intp] = np.searchsorted(shares, points, side="right")
    # A point that rounds up to 1 draws the last one that has a share.
    drawn = np.minimum(drawn, np.flatnonzero(weights)[-1])
    rank = np.empty(len(values), np.intp)
    rank[ranked(values)] = np.arange(len(values))
    order: NDArray[np.intp] = drawn[np.argsort(rank[drawn], kind="stable")]
    return order


def _first_of_equals(texts: Sequence[Sequence[int]]) -> NDArray[np.intp]:
    first: dict[tuple[int, ...], int] = {}
    for i, text in enumerate(texts):
        first.setdefault(tuple(text), i)
    return np.array(list(first.values()), np.intp)
