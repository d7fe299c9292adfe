"""Replay: a recorded search's samples in the place of its server's."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from w2s_fast.errors import InvalidRequest, RemoteFailure
from w2s_fast.remote.drawing import Ask, Drawing, Given
from w2s_fast.remote.prompt import RemotePrompt
from w2s_fast.result import Draw, Sample, SearchResult, Trace


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
    """Traces: of one or several, of results that have them, or of their records. InvalidRequest."""
    if isinstance(given, (str, os.PathLike)):
        given = _read(Path(given))
    one_of_them = isinstance(given, (Trace, SearchResult, Mapping))
    each = [given] if one_of_them or not isinstance(given, Iterable) else list(given)
    return [_trace_of(one) for one in each]


def _read(path: Path) -> list[Any]:
    """Records of a JSONL file that have traces. InvalidRequest: it is none."""
    try:
        with path.open(encoding="utf-8") as lines:
            records = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{path} is no JSONL of `generate --trace`: {error}") from error
    return [one for one in records if isinstance(one, dict) and one.get("trace")]


def _trace_of(one: Any) -> Trace:
    """Without draws where it is none of a remote base."""
    found = one.trace if isinstance(one, SearchResult) else one
    if isinstance(found, Mapping):
        found = found.get("trace", found)
        try:
            draws = [[_draw(draw) for draw in own] for own in found["draws"]]
            return Trace([], found["prompt"], draws)
        except (KeyError, TypeError) as error:
            raise InvalidRequest(f"a record holds no trace of a remote base: {error}") from None
    return found if isinstance(found, Trace) else Trace()


def _draw(record: Mapping[str, Any]) -> Draw:
    return Draw(**{**record, "samples": [Sample(**sample) for sample in record["samples"]]})


def _as_then(ask: Ask, draw: Draw) -> bool:
    """Whether that was asked for when this came."""
    enough = len(draw.samples) == ask.samples or (
        draw.ended is not None and len(draw.samples) < ask.samples
    )
    same = (draw.behind, draw.max_tokens, draw.seed) == (ask.behind, ask.max_tokens, ask.seed)
    return same and enough


def _key(prompt: Any) -> str:
    return json.dumps(prompt, sort_keys=True, default=str)
