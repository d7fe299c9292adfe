"""What requests held that were set aside, run again: what the beams of one share is run once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from w2s_fast.cache import Int32Array
from w2s_fast.models import PagedModel, inference
from w2s_fast.search.request import Request


@inference
def recompute(
    model: PagedModel, requests: Sequence[Request], prompts: Sequence[Sequence[int]]
) -> list[Int32Array]:
    """New slots for the hypotheses that go on: all but the last token of each text.

    Args:
        requests: each with such a hypothesis, between two rounds.
        prompts: theirs, of this model.

    Returns:
        For each request the slots of those hypotheses, in their order.

    Raises:
        OutOfPages: there is no room.
    """
    texts, shared = [], []
    for request, prompt in zip(requests, prompts):
        alive = [beam.tokens for beam in request.beams.kept if beam.finish_reason is None]
        texts.append([[*prompt, *tokens][:-1] for tokens in alive])
        shared.append(len(prompt) + min(request.beams.shared, len(alive[0]) - 1))

    def run(slots: Sequence[int], chunks: Sequence[Sequence[int]]) -> None:
        rows = [i for i, chunk in enumerate(chunks) if chunk]
        tokens = [token for chunk in chunks for token in chunk]
        if rows:
            model.forward(
                [slots[i] for i in rows],
                torch.tensor(tokens, device=model.device),
                [len(chunks[i]) for i in rows],
            )

    roots = model.pool.allocate(len(texts)).tolist()
    beginnings = [own[0][:count] for own, count in zip(texts, shared)]
    cached = model.pool.adopt(roots, beginnings)
    run(roots, [text[found:] for text, found in zip(beginnings, cached)])
    others = iter(model.pool.fork(roots, [len(own) - 1 for own in texts]).tolist())
    slots = [[root, *(next(others) for _ in own[1:])] for root, own in zip(roots, texts)]
    run(
        [slot for own in slots for slot in own],
        [text[count:] for own, count in zip(texts, shared) for text in own],
    )
    return [np.array(own, np.int32) for own in slots]
