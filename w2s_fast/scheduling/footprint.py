"""How many pages a request needs at most; in its next round: csrc/beams.h."""

from __future__ import annotations

from w2s_fast.search import Request
from w2s_fast.widths import RoundShape


def pages_at_most(request: Request, model: int, page_size: int) -> int:
    """Pages that a request can hold in one model at one time, in any round; 0: the base."""
    prompt = len(request.prompts[model])
    return max(
        _pages_in(shape, prompt, request.params.max_new_tokens, model, page_size)
        for shape in request.params.widths.shapes()
    )


def _pages_in(
    shape: RoundShape, prompt: int, max_new_tokens: int, model: int, page_size: int
) -> int:
    """The same in rounds of this shape."""
    # The base forks when the last token of the text has been run, the guides before that; both run
    # the chunk's tokens but the last.
    common = (prompt - (model != 0)) // page_size
    if not shape.exact:  # after any number of tokens
        history = prompt + max_new_tokens
        chunk = -(-(page_size - 1 + shape.chunk) // page_size)
    else:
        history = prompt - (model != 0) + shape.before
        chunk = -(-(history % page_size + shape.chunk - (model == 0)) // page_size)
    # Where a candidate is kept more than once, each copy ends in a page of its own.
    rows = max(shape.rows, shape.kept)
    return common + shape.hypotheses * (history // page_size - common) + rows * chunk
