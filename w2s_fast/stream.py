"""The text of a request under way: what all its hypotheses agree on, and nothing else.

Every hypothesis that can still win descends from one of the present candidates, so what all of
those begin with will be part of the answer whatever is selected later. It only ever grows: a piece
that was given out is never taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from w2s_fast.request import Beam, Request
from w2s_fast.result import SearchResult

_INCOMPLETE = "\ufffd"  # what decoders write for a character of which bytes are missing


@dataclass(frozen=True)
class StreamPiece:
    """A piece of a response, in order; the last one carries the result.

    Attributes:
        text: what is new; all pieces together are ``result.text``. None without a tokenizer.
        token_ids: what is new; all pieces together are ``result.token_ids``. Text may come later
            than its tokens: a character is held back until all its bytes are there.
        result: in the last piece only.
    """

    text: str | None
    token_ids: list[int]
    result: SearchResult | None = None


class Agreement:
    """What the candidates of one request agree on so far."""

    def __init__(self, request: Request, decode: Callable[[list[int]], str] | None) -> None:
        """``decode``: from response tokens to text; None: there is no tokenizer."""
        self._request = request
        self._decode = decode
        self._tokens: list[int] = []
        self._text = ""

    def grow(self) -> StreamPiece | None:
        """What is new since the last call; None if there is nothing. Under the runner's lock."""
        request = self._request
        tokens = _common([_lasting(b) for b in request.candidates or request.beams])
        if len(tokens) <= len(self._tokens):
            return None
        new = tokens[len(self._tokens) :]
        self._tokens = tokens
        if self._decode is None:
            return StreamPiece(None, new)
        text = self._decode(tokens).rstrip(_INCOMPLETE)
        return StreamPiece(self._new_text(text), new)

    def finish(self, result: SearchResult) -> StreamPiece:
        """The rest of the answer."""
        text = None if result.text is None else self._new_text(result.text)
        return StreamPiece(text, result.token_ids[len(self._tokens) :], result)

    def _new_text(self, text: str) -> str:
        if not text.startswith(self._text):
            return ""  # the decoder changed its mind about the end: wait until it agrees
        new = text[len(self._text) :]
        self._text = text
        return new


def _lasting(beam: Beam) -> list[int]:
    """Without the EOS or stop token, which is no part of the text."""
    return beam.tokens[:-1] if beam.finish_reason in ("eos", "stop") else beam.tokens


def _common(texts: Sequence[list[int]]) -> list[int]:
    """The longest common prefix."""
    if not texts:
        return []
    low, high = min(texts), max(texts)
    agree = next((i for i, (a, b) in enumerate(zip(low, high)) if a != b), min(len(low), len(high)))
    return low[:agree]
