"""The text of a request under way: what all its hypotheses agree on, and nothing else.

Every hypothesis that can still win descends from one of the present candidates, so what all of
those begin with will be part of the answer whatever is selected later
(:meth:`w2s_fast.search.Request.agreed_tokens`). It only ever grows: a piece that was given out is
never taken back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from w2s_fast.result import SearchResult
from w2s_fast.search import Ends
from w2s_fast.text import INCOMPLETE, decode_response, open_bytes


@dataclass(frozen=True)
class StreamPiece:
    """A piece of a response, in order; the last one carries the result.

    Attributes:
        text: what is new; all pieces together are ``result.text``. None without a tokenizer.
        token_ids: what is new; all pieces together are ``result.token_ids``. Text may come later
            than its tokens: a character is held back until all its bytes are there. Neither comes
            while it may belong to a stop string.
        result: in the last piece only.
    """

    text: str | None
    token_ids: list[int]
    result: SearchResult | None = None


class Pieces:
    """Cuts one growing response into pieces."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        prompt: Sequence[int],
        ends: Ends | None = None,
    ) -> None:
        """``prompt``: the base's tokens, behind which the response is decoded. ``ends``: of its
        text; what may belong to a stop string is held back until it is known not to."""
        self._tokenizer = tokenizer
        self._ends = ends
        self._prompt = prompt
        self._given = 0  # tokens
        self._text = ""

    def next(self, tokens: list[int]) -> StreamPiece | None:
        """What is new in ``tokens``, the response so far; None if there is nothing."""
        if self._ends is not None and len(tokens) > self._given:
            tokens = tokens[: self._ends.settled(tokens, self._given)]
        if len(tokens) <= self._given:
            return None
        new = tokens[self._given :]
        self._given = len(tokens)
        if self._tokenizer is None:
            return StreamPiece(None, new)
        whole = tokens[: len(tokens) - open_bytes(self._tokenizer, tokens)]
        text = decode_response(self._tokenizer, self._prompt, whole)
        return StreamPiece(self._new_text(text.rstrip(INCOMPLETE)), new)

    def last(self, result: SearchResult) -> StreamPiece:
        """The rest of the answer."""
        text = None if result.text is None else self._new_text(result.text)
        return StreamPiece(text, result.token_ids[self._given :], result)

    def _new_text(self, text: str) -> str:
        if not text.startswith(self._text):
            return ""  # a decoder that rewrites what it has written: nothing is taken back
        new = text[len(self._text) :]
        self._text = text
        return new
