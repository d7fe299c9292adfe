"""How many pages a request needs at most; in its next round: csrc/beams.h."""

from __future__ import annotations

from typing import TypeAlias

from w2s_fast.search import Request

# A model of a guide: which guide's, and 0 for its tuned or 1 for its untuned one.
OfGuide: TypeAlias = tuple[int, int]


def pages_at_most(request: Request, guide: OfGuide | None, page_size: int) -> int:
    """Pages that a request can hold in one model at one time, in any round; None: the base."""
    params = request.params
    prompt = _prompt_length(request, guide)
    if params.tokens_per_round == params.max_new_tokens:
        # The base forks when the prompt's last token has been run, the guides before that; both run
        # the chunk's tokens but the last.
        history = prompt - (guide is not None)
        new = params.max_new_tokens - (guide is None)
        chunk = -(-(history % page_size + new) // page_size)
        return history // page_size + params.first_candidates * chunk
    longest = prompt + params.max_new_tokens
    histories = params.kept * (longest // page_size - prompt // page_size)
    chunk = -(-(page_size - 1 + params.tokens_per_round) // page_size)
    return prompt // page_size + histories + request.rows * chunk


def _prompt_length(request: Request, guide: OfGuide | None) -> int:
    if guide is None:
        return len(request.prompt)
    g, m = guide
    return len(request.guide_prompts[g][m])
