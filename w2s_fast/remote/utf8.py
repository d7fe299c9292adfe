"""Responses of which only the text is known: their tokens are the bytes of it, in UTF-8.

So whatever holds, compares and cuts responses as tokens does the same with these. One more id
stands for an EOS. No id of these ever leaves the engine.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import NamedTuple

EOS = 256


def to_bytes(text: str) -> list[int]:
    """A text as ids. Half a surrogate pair, which UTF-8 has not, becomes ``?``."""
    return list(text.encode("utf-8", "replace"))


def to_text(ids: Sequence[int]) -> str:
    """And back, without an EOS; without a character at the end of which bytes are missing."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(_bytes(ids))


class Heard(NamedTuple):
    """What a response says."""

    text: str = ""


class Utf8Texts:
    """What growing responses say, for guides of other vocabularies."""

    def extend(self, texts: Sequence[tuple[object, Sequence[int], object, bool]]) -> list[Heard]:
        return [Heard(to_text(tokens)) for _, tokens, *_ in texts]


class Utf8End(NamedTuple):
    """The end of a text: how many bytes are kept, and the stop string that stands behind them."""

    tokens: int
    stop: str
    rest: str = ""


class Utf8Stops:
    """Where responses end by what they say: at the stop string that is complete first."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = {stop: _spelled(stop) for stop in stops}
        self._longest = max(map(len, self._stops.values()))

    def find(self, tokens: Sequence[int], known: int) -> Utf8End | None:
        """Of several that are complete together it is the longest.

        Args:
            tokens: of the response so far. known: how many of them showed no end before.
        """
        first = max(0, known - self._longest + 1)
        text = _bytes(tokens[first:])
        found = [
            (at + len(own), -len(own), stop)
            for stop, own in self._stops.items()
            if (at := text.find(own, max(0, known - first - len(own) + 1))) >= 0
        ]
        if not found:
            return None
        end, length, stop = min(found)
        return Utf8End(first + end + length, stop)

    def settled(self, tokens: Sequence[int], known: int) -> int:
        """How many of them belong to the text whatever comes."""
        text = _bytes(tokens)
        held = max(
            (
                n
                for own in self._stops.values()
                for n in range(1, len(own))
                if text.endswith(own[:n])
            ),
            default=0,
        )
        return len(tokens) - held


class Utf8Breaks:
    """Where responses are broken into parts: behind strings that stay in them."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = [_spelled(string) for string in strings]

    def find(self, tokens: Sequence[int], known: int) -> int | None:
        """How many bytes there are up to the end of the next part; None: it goes on.

        Args:
            tokens: of the response so far. known: how many of them the parts before have.
        """
        text = _bytes(tokens)
        ends = [
            at + len(own)
            for own in self._strings
            if (at := text.find(own, max(0, known - len(own) + 1))) >= 0
        ]
        return min(ends, default=None)


def _spelled(string: str) -> bytes:
    """What half a surrogate pair is written as stands in no text."""
    return string.encode("utf-8", "surrogatepass")


def _bytes(ids: Sequence[int]) -> bytes:
    return bytes(token for token in ids if token != EOS)
