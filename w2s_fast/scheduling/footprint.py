"""How many rows and pages a request needs: in its next round, and at most."""

from __future__ import annotations

from typing import TypeAlias

from w2s_fast.search import Request

# A model of a guide: which guide's, and 0 for its tuned or 1 for its untuned one.
OfGuide: TypeAlias = tuple[int, int]


def rows_at_most(request: Request) -> int:
    """Rows that a request can have in a decoding step, each with a slot of its own."""
    params = request.params
    if params.method == "cbs":
        return max(params.first_candidates, params.kept)
    return params.first_candidates


def pages_at_most(request: Request, guide: OfGuide | None, page_size: int) -> int:
    """Pages that a request can hold in one model at one time, in any round; None: the base."""
    params = request.params
    if params.tokens_per_round == params.max_new_tokens:
        return round_pages(request, guide, page_size)
    prompt = _prompt_length(request, guide)
    longest = prompt + params.max_new_tokens
    histories = params.kept * (longest // page_size - prompt // page_size)
    chunk = -(-(page_size - 1 + params.tokens_per_round) // page_size)
    return prompt // page_size + histories + rows_at_most(request) * chunk


def round_pages(request: Request, guide: OfGuide | None, page_size: int) -> int:
    """Pages that a request can hold in one model during its next round; None: the base.

    P + W h + W K L tokens' worth: the full pages that all rows share, the other full pages of each
    hypothesis, and those of each candidate behind them.
    """
    params = request.params
    prompt = _prompt_length(request, guide)
    if request.beams:
        alive = [beam for beam in request.beams if not beam.finished]
        tokens, shared, hypotheses = len(alive[0].tokens), request.shared_tokens, len(alive)
        rows = hypotheses * params.successors
    else:
        tokens, shared, hypotheses, rows = 0, 0, 1, params.first_candidates
    # The base forks when the last token of the text has been run, the guides before that; both run
    # the chunk's tokens but the last.
    history = prompt + tokens - (guide is not None)
    new = min(params.tokens_per_round, params.max_new_tokens - tokens) - (guide is None)
    common = min(prompt + shared - (guide is not None), history) // page_size
    histories = hypotheses * (history // page_size - common)
    return common + histories + rows * -(-(history % page_size + new) // page_size)


def _prompt_length(request: Request, guide: OfGuide | None) -> int:
    if guide is None:
        return len(request.prompt)
    g, m = guide
    return len(request.guide_prompts[g][m])
