"""A search told round by round: what the page draws, live or from a saved trace."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import asdict
from typing import Any, Protocol

from w2s_fast.params import SearchParams
from w2s_fast.result import Candidate, Round
from w2s_fast.serve.refusals import as_refusal
from w2s_fast.serve.search_fields import SearchFields
from w2s_fast.serve.service import Service
from w2s_fast.serve.streams import event

Event = dict[str, Any]
# What the page's form shows of the server's defaults, by its own names.
_SHOWN = ("method", "beam_width", "successors", "chunk_length", "temperature", "top_k")


class Decode(Protocol):
    """From token ids of a response to its text."""

    def __call__(self, token_ids: list[int], /) -> str: ...


class LiveBody(SearchFields):
    """A prompt, and how to search."""

    model: str | None = None
    prompt: str | list[int]


class RoundEvents:
    """Rounds of one search, one after the other, as events."""

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._before: list[Candidate] = []  # kept in the last round, best first
        self._number = 0

    def of(self, one: Round) -> Event:
        """A candidate's text is what it adds to its parent's."""
        self._number += 1
        candidates = [
            {
                "parent": c.parent,
                "text": self._added(c),
                "score": c.score,
                "finish": c.finish_reason,
            }
            for c in one.candidates
        ]
        self._before = [one.candidates[i] for i in one.kept]
        return {
            "type": "round",
            "number": self._number,
            "candidates": candidates,
            "kept": list(one.kept),
        }

    def _added(self, candidate: Candidate) -> str:
        whole = self._text_of(candidate)
        if candidate.parent is None:
            return whole
        parent = self._text_of(self._before[candidate.parent])
        return whole[len(parent) :] if whole.startswith(parent) else whole

    def _text_of(self, candidate: Candidate) -> str:
        return self._decode(candidate.token_ids) if candidate.text is None else candidate.text


def saved_events(
    prompt: str, rounds: Sequence[Round], decode: Decode, done: Event
) -> Iterator[Event]:
    """A search that has ended. ``done``: the rest of its last event."""
    yield {"type": "search", "prompt": prompt}
    told = RoundEvents(decode)
    yield from map(told.of, rounds)
    yield {"type": "done", **done}


def about(service: Service) -> Event:
    """What the page's form begins with."""
    defaults = {name: getattr(service.defaults, name) for name in _SHOWN}
    shown = {
        name: value for name, value in defaults.items() if isinstance(value, (int, float, str))
    }
    shown["max_tokens"] = service.defaults.max_new_tokens
    return {"model": service.settings.name, "defaults": shown}


async def live(service: Service, body: LiveBody, params: SearchParams) -> AsyncIterator[bytes]:
    """Server-sent events: ``search``, ``round`` and ``text`` as they come, and ``done``."""
    prompt = body.prompt if isinstance(body.prompt, str) else service.decode(body.prompt)
    decode = service.decoder(body.prompt)
    told = RoundEvents(decode)
    begin, begun = time.perf_counter(), False
    try:
        async with aclosing(service.watch(body.prompt, params)) as told_by:  # type: ignore[type-var]
            async for each in told_by:
                if not begun:
                    begun = True
                    yield event({"type": "search", "prompt": prompt})
                if isinstance(each, Round):
                    yield event(told.of(each))
                    continue
                if each.text:
                    yield event({"type": "text", "text": each.text})
                if each.result is not None:
                    done = {
                        "text": each.result.text,
                        "score": each.result.score,
                        "finish_reason": each.result.finish_reason,
                        "usage": asdict(each.result.usage),
                        "seconds": time.perf_counter() - begin,
                        "seed": params.seed,
                    }
                    yield event({"type": "done", **done})
    except Exception as error:
        if not begun:
            raise
        yield event({"type": "error", **as_refusal(error).body["error"]})
