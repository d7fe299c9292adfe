"""Replay: a recorded search's samples in the place of its server's."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable
from typing import Any

from w2s_fast.errors import InvalidRequest, RemoteFailure
from w2s_fast.remote.drawing import Ask, Drawing, Given
from w2s_fast.remote.prompt import RemotePrompt
from w2s_fast.result import Draw, SearchResult, Trace


class Replay:
    """Answers as recorded, search by search, as long as what is asked is what was asked then."""

    def __init__(self, recorded: Iterable[Trace]) -> None:
        """InvalidRequest: a trace is not of a remote base."""
        self._count = 0
        self._recorded: dict[str, list[list[list[Draw]]]] = {}  # of each prompt, its searches
        for trace in recorded:
            if not isinstance(trace, Trace) or trace.prompt is None:
                raise InvalidRequest(
                    "a trace of a remote base is needed: SearchParams(trace=True) records it"
                )
            self._recorded.setdefault(_key(trace.prompt), []).append(trace.draws)
            self._count += 1

    @property
    def about(self) -> str:
        return f"a recording of {self._count} {'search' if self._count == 1 else 'searches'}"

    def accepts(self, prompt: object) -> str | None:
        return None

    def lacks(self, names: Collection[str]) -> set[str]:
        return set()

    def draw(self, prompt: RemotePrompt, drawing: Drawing, told: Callable[[], None]) -> None:
        try:
            drawing.fill(self._given(prompt, drawing))
        except RemoteFailure as error:
            drawing.fill(error=error)
        told()

    def keep_only(self, drawings: Collection[Drawing]) -> None:
        """Nothing is ever under way."""

    def _given(self, prompt: RemotePrompt, drawing: Drawing) -> list[Given]:
        searches = self._recorded.get(_key(prompt.content))
        if searches is None:
            raise RemoteFailure("the recording has no search of this prompt")
        for draws in searches:
            recorded = draws[drawing.number - 1] if drawing.number <= len(draws) else []
            if len(recorded) == len(drawing.asks) and all(map(_as_then, drawing.asks, recorded)):
                return [Given(list(draw.samples), draw.ended) for draw in recorded]
        raise RemoteFailure(
            f"in round {drawing.number} the search goes another way than the recorded one; "
            "allowed: the same parameters, and guides that choose the same candidates"
        )


def traces_of(given: Any) -> list[Trace]:
    """Traces: of one or several, or of results that have them."""
    one_of_them = isinstance(given, (Trace, SearchResult)) or not isinstance(given, Iterable)
    each = [given] if one_of_them else list(given)
    found = [one.trace if isinstance(one, SearchResult) else one for one in each]
    return [one if isinstance(one, Trace) else Trace() for one in found]


def _as_then(ask: Ask, draw: Draw) -> bool:
    """Whether that was asked for when this came."""
    enough = len(draw.samples) == ask.samples or (
        draw.ended is not None and len(draw.samples) < ask.samples
    )
    same = (draw.behind, draw.max_tokens, draw.seed) == (ask.behind, ask.max_tokens, ask.seed)
    return same and enough


def _key(prompt: Any) -> str:
    return json.dumps(prompt, sort_keys=True, default=str)
