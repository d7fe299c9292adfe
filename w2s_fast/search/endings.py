"""Texts and chunks that end by what they say: candidates are cut where an end is found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from w2s_fast._pages import rank_continuations
from w2s_fast.errors import EngineFailure
from w2s_fast.search.request import Request


def end_texts(requests: Sequence[Request]) -> None:
    """Cut candidates whose texts, or chunks, have ended with the tokens of this round.

    A text that ends in the token that its chunk ends with, or before, has ended.
    """
    for request in requests:
        if not request.is_read or request.error is not None:
            continue
        ends, breaks = request.ends, request.breaks
        with _its_own_error(request):
            for candidate, known, tokens in request.beams.new_texts():
                chunk = None if breaks is None else breaks.find(tokens, known)
                found = None if ends is None else ends.find(tokens[:chunk], known)
                if found is not None:
                    request.beams.end_text(candidate, found.tokens, len(request.ended_texts))
                    request.ended_texts.append(found)
                elif chunk is not None:
                    request.beams.pause(candidate, chunk)


def ended_continuations(
    requests: Sequence[Request], tokens: NDArray[np.int32], logprobs: NDArray[np.float32]
) -> list[tuple[int, int, int, int]]:
    """Continuations of beams with which a text ends, as :func:`advance_beams` is told of them."""
    ended = []
    beams = [request.beams for request in requests]
    for index, request in enumerate(requests):
        if request.ends is None or request.error is not None:
            continue
        kept = [beam.tokens for beam in request.beams.kept] or [[]]  # in round 1, the root
        width, going_on = request.params.kept, 0
        ranked = rank_continuations(beams, tokens, logprobs, index)
        with _its_own_error(request):
            for rank, (parent, token, ends) in enumerate(ranked):
                if rank >= width and going_on == width:
                    break  # nobody asks for those behind
                if ends:
                    continue
                text = [*kept[parent], token]
                if (found := request.ends.find(text, len(text) - 1)) is None:
                    going_on += 1
                    continue
                ended.append((index, rank, found.tokens, len(request.ended_texts)))
                request.ended_texts.append(found)
    return ended


@contextmanager
def _its_own_error(request: Request) -> Iterator[None]:
    """A tokenizer may raise anything; that ends the request whose text it was, and no other."""
    try:
        yield
    except Exception as error:
        request.error = EngineFailure(f"the response cannot be decoded: {error}")
        request.error.__cause__ = error
