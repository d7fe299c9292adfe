"""Where the text of a response ends: at the stop string that is complete first.

A text is looked at as it grows, a few characters back from what is new. So what is found does not
depend on how many tokens came at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from w2s_fast.text.response import INCOMPLETE, open_bytes
from w2s_fast.text.window import Window, special_ids


@dataclass(frozen=True)
class TextEnd:
    """The end of a text.

    Attributes:
        tokens: how many come before the one that the stop string begins in; they are kept.
        rest: what that one has of the text before the stop string.
        stop: the stop string.
    """

    tokens: int
    rest: str
    stop: str


class StopStrings:
    """The stop strings of one request, and where its hypotheses' texts end by them."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Sequence[int],
        stops: Sequence[str],
        least_tokens: int = 0,
    ) -> None:
        """``prompt``: the base's tokens. ``least_tokens``: what is complete within so many tokens
        ends no text."""
        self._tokenizer = tokenizer
        self._prompt = list(prompt)
        self._stops = tuple(dict.fromkeys(stops))
        self._least = least_tokens
        self._longest = max(map(len, self._stops))

    @cached_property
    def _ids(self) -> dict[int, str]:
        return special_ids(self._tokenizer, self._stops)

    def find(self, tokens: Sequence[int], known: int) -> TextEnd | None:
        """Where the text of a response ends, if it does.

        Args:
            tokens: of the response so far, without one that ends it by itself.
            known: how many of the first ones were looked at before, and showed no end.
        """
        new = range(max(known, self._least), len(tokens))
        behind = next((i for i in new if tokens[i] in self._ids), len(tokens))
        window = Window(self._tokenizer, self._prompt, tokens[:behind], known, self._longest)
        if (match := self._first_match(window, tokens[:behind])) is not None:
            start, stop = match
            kept = window.tokens_before(start)
            return TextEnd(kept, window.text[len(window.text_of(kept)) : start], stop)
        if behind < len(tokens):
            return TextEnd(behind, "", self._ids[tokens[behind]])
        return None

    def settled(self, tokens: Sequence[int], known: int) -> int:
        """How many of the tokens belong to the text whatever comes: no stop string can begin there.

        Args:
            tokens: of the response so far, in which no text ends. known: of which this is known.
        """
        tokens = tokens[: len(tokens) - open_bytes(self._tokenizer, tokens)]
        window = Window(self._tokenizer, self._prompt, tokens, known, self._longest)
        text = window.text.rstrip(INCOMPLETE)
        held = max(
            (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
            default=0,
        )
        if held == 0 and text == window.text:
            return len(tokens)
        return window.tokens_before(len(text) - held)

    def _first_match(self, window: Window, tokens: Sequence[int]) -> tuple[int, str] | None:
        """Where the stop string begins that is complete first; of several the longest."""
        ends_behind = 0
        if self._least > window.first:
            ends_behind = len(window.text_of(min(self._least, len(tokens))))
        found = [
            (end, -len(stop), stop)
            for stop in self._stops
            if (end := _first_end(window.text, stop, ends_behind)) is not None
        ]
        if not found:
            return None
        end, length, stop = min(found)
        return end + length, stop


def _first_end(text: str, stop: str, behind: int) -> int | None:
    """Where the first ``stop`` ends that is complete only behind so many characters."""
    at = text.find(stop, max(0, behind - len(stop) + 1))
    return None if at < 0 else at + len(stop)
