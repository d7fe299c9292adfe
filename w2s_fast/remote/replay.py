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
        self._draws: dict[str, list[list[Draw]]] = {}
        for trace in recorded:
            if not isinstance(trace, Trace) or trace.prompt is None:
                raise InvalidRequest(
                    "a trace of a remote base is needed: SearchParams(trace=True) records it"
                )
            self._draws[_key(trace.prompt)] = trace.draws

    @property
    def about(self) -> str:
        searches = "search" if len(self._draws) == 1 else "searches"
        return f"a recording of {len(self._draws)} {searches}"

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
        rounds = self._draws.get(_key(prompt.content))
        if rounds is None:
            raise RemoteFailure("the recording has no search of this prompt")
        recorded = rounds[drawing.number - 1] if drawing.number <= len(rounds) else []
        if len(recorded) != len(drawing.asks):
            raise _another_way(drawing.number)
        return [_given(ask, draw, drawing.number) for ask, draw in zip(drawing.asks, recorded)]


def traces_of(given: Any) -> list[Trace]:
    """Traces: of one or several, or of results that have them."""
    each = [given] if isinstance(given, (Trace, SearchResult)) else list(given)
    found = [one.trace if isinstance(one, SearchResult) else one for one in each]
    return [one if isinstance(one, Trace) else Trace() for one in found]


def _given(ask: Ask, draw: Draw, number: int) -> Given:
    as_then = draw.behind == ask.behind and draw.max_tokens == ask.max_tokens
    enough = len(draw.samples) == ask.samples or (draw.ended and len(draw.samples) < ask.samples)
    if not (as_then and enough):
        raise _another_way(number)
    return Given(list(draw.samples), draw.ended)


def _another_way(number: int) -> RemoteFailure:
    return RemoteFailure(
        f"in round {number} the search goes another way than the recorded one; allowed: the same "
        "parameters, and guides that choose the same candidates"
    )


def _key(prompt: Any) -> str:
    return json.dumps(prompt, sort_keys=True, default=str)
