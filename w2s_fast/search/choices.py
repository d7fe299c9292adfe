"""Rounds in which the host chooses who is kept: opened when all candidates are complete, and closed
when it is decided."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from w2s_fast._pages import Beam, Beams, end_rounds
from w2s_fast.models import PagedModel
from w2s_fast.search.foreign_side import ForeignSide
from w2s_fast.search.request import Request
from w2s_fast.stats import timed


class Closes(Protocol):
    """A side of the search that holds something of its own for every candidate."""

    def close(self, request: Request, kept: Sequence[int]) -> None:
        """These of the candidates are its hypotheses now, best first."""
        ...


class Choices:
    """Of all requests of a search."""

    def __init__(
        self, models: Sequence[PagedModel], foreign: ForeignSide, sides: Sequence[Closes]
    ) -> None:
        """``models``: those in whose pages the beams have slots."""
        self._models = models
        self._managers = [model.pool.manager for model in models]
        self._foreign = foreign
        self._sides = sides

    def open(self, requests: Sequence[Request]) -> None:
        """Their candidates are complete. Where no code of the caller's is asked, choose at once."""
        at_once = []
        beams = [request.beams.candidates for request in requests]
        foreign = self._foreign_scores(requests, beams)
        for request, candidates in zip(requests, beams):
            if request.error is not None:
                continue
            request.open_choice(candidates, foreign.get(request))
            if request.choice is not None and not request.asks_the_caller:
                request.choice.decide()
                at_once.append(request)
        self.close(at_once)

    def close(self, requests: Sequence[Request]) -> None:
        """Close rounds of which it was decided who is kept; others may have stepped meanwhile."""
        chosen = [(request, request.choice) for request in requests if request.choice is not None]
        for request, choice in chosen:
            request.error = choice.error
        closed = [(request, choice) for request, choice in chosen if choice.kept is not None]
        for request, choice in closed:
            request.beams.set_extras(choice.extras)
        self.end([request for request, _ in closed], [choice.kept or [] for _, choice in closed])
        for request, _ in closed:
            request.choice = None

    def end(self, requests: Sequence[Request], found: Sequence[Sequence[int]]) -> None:
        """Keep these candidates of each request, best first."""
        if not requests:
            return
        kept = np.full((len(found), max(map(len, found))), -1, np.int64)
        for row, own in zip(kept, found):
            row[: len(own)] = own
        copies = end_rounds(_beams(requests), kept, self._managers)
        for model, pairs in zip(self._models, copies):
            model.pool.copy_pages(pairs)
        for request, own in zip(requests, found):
            for side in self._sides:
                side.close(request, own)
        count_rounds(requests)

    def _foreign_scores(
        self, requests: Sequence[Request], candidates: Sequence[Sequence[Beam]]
    ) -> dict[Request, NDArray[np.float64]]:
        own = [i for i, request in enumerate(requests) if request.foreign is not None]
        if not own:
            return {}
        asking = [requests[i] for i in own]
        with timed("scoring_s", [request.stats for request in asking]):
            found = self._foreign.score(asking, [candidates[i] for i in own])
        return dict(zip(asking, found))


def count_rounds(requests: Sequence[Request]) -> None:
    """A round of each has ended."""
    for request in requests:
        request.stats.rounds += 1


def _beams(requests: Sequence[Request]) -> list[Beams]:
    return [request.beams for request in requests]
