"""How many pages a request needs at most; in its next round: csrc/beams.h."""

from __future__ import annotations

from w2s_fast.search import Request
from w2s_fast.widths import RoundShape


def pages_at_most(request: Request, model: int, page_size: int) -> int:
    """Pages that a request can hold in one model at one time, in any round; 0: the base."""
    shapes = request.params.widths.shapes()
    return max(_pages_in(shape, request, model, page_size) for shape in shapes)


def _pages_in(shape: RoundShape, request: Request, model: int, page_size: int) -> int:
    """The same in rounds of this shape."""
    params = request.params
    # The base forks when the last token of the text has been run, the guides before that; both run
    # the chunk's tokens but the last.
    prompt = len(request.prompts[model]) - (model != 0)
    common = prompt // page_size
    # Where a candidate is kept more than once, each copy ends in a page of its own.
    copies = max(0, shape.kept - shape.rows)

    def pages_after(tokens: int) -> int:
        history = prompt + tokens
        chunk = min(shape.chunk, params.max_new_tokens - tokens)
        end = -(-(history % page_size + chunk - (model == 0)) // page_size)
        end = max(end, params.keeps_copies)
        return shape.hypotheses * (history // page_size - common) + shape.rows * end

    befores = range(shape.before, shape.before + 1)
    if not shape.exact:
        # Most where the last chunk that is full begins, but for what a page rounds up.
        last = params.max_new_tokens - shape.chunk
        befores = range(max(shape.before, last - page_size + 1), last + 1)
    return common + max(map(pages_after, befores)) + copies
