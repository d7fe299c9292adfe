"""The text of a request under way: what all its hypotheses agree on, and nothing else.

Every hypothesis that can still win descends from one of the present candidates, so what all of
those begin with will be part of the answer whatever is selected later
(:meth:`w2s_fast.search.Request.agreed_tokens`). It only ever grows: a piece that was given out is
never taken back.
"""

from __future__ import annotations

from dataclasses import dataclass

from w2s_fast.engine.outcome import ResponseDecoder
from w2s_fast.result import SearchResult
from w2s_fast.search import Ends


@dataclass(frozen=True)
class StreamPiece:
    """A piece of a response, in order; the last one carries the result.

    Attributes:
        text: what is new; all pieces together are ``result.text``. None without a tokenizer.
        token_ids: what is new; all pieces together are ``result.token_ids``, none of a remote base.
            Text may come later
            than its tokens: a character is held back until all its bytes are there. Neither comes
            while it may belong to a stop string.
        result: in the last piece only.
    """

    text: str | None
    token_ids: list[int]
    result: SearchResult | None = None


class Pieces:
    """Cuts one growing response into pieces."""

    def __init__(self, decoder: ResponseDecoder, ends: Ends | None = None) -> None:
        """``ends``: of its text; what may belong to a stop string is held back until it is known
        not to."""
        self._decoder = decoder
        self._ends = ends
        self._given = 0  # tokens
        self._text = ""

    def next(self, tokens: list[int]) -> StreamPiece | None:
        """What is new in ``tokens``, the response so far; None if there is nothing."""
        try:
            if self._ends is not None and len(tokens) > self._given:
                tokens = tokens[: self._ends.settled(tokens, self._given)]
            if len(tokens) <= self._given:
                return None
            text = self._decoder.certain(tokens)
        except Exception:  # a tokenizer may raise anything: the result says what is wrong
            return None
        new = self._decoder.ids(tokens[self._given :])
        self._given = len(tokens)
        return StreamPiece(None if text is None else self._new_text(text), new)

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
