"""How many pages a request needs at most; in its next round: csrc/beams.h."""

from __future__ import annotations

from w2s_fast.search import Request


def pages_at_most(request: Request, model: int, page_size: int) -> int:
    """Pages that a request can hold in one model at one time, in any round; 0: the base."""
    params = request.params
    prompt = len(request.prompts[model])
    if params.tokens_per_round == params.max_new_tokens:
        # The base forks when the prompt's last token has been run, the guides before that; both run
        # the chunk's tokens but the last.
        history = prompt - (model != 0)
        new = params.max_new_tokens - (model == 0)
        chunk = -(-(history % page_size + new) // page_size)
        return history // page_size + params.first_candidates * chunk
    longest = prompt + params.max_new_tokens
    histories = params.kept * (longest // page_size - prompt // page_size)
    chunk = -(-(page_size - 1 + params.tokens_per_round) // page_size)
    return prompt // page_size + histories + request.rows * chunk
