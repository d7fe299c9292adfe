"""What requests held that were set aside, run again: what the beams of one share is run once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from w2s_fast.cache import Int32Array
from w2s_fast.models import PagedModel
from w2s_fast.search.beam import Beam


class SharedTexts(NamedTuple):
    """Texts of a few sequences that have their first ``shared`` tokens, at least one, in common."""

    texts: list[list[int]]
    shared: int


def shared_texts(
    prompts: Sequence[Sequence[int]], beams: Sequence[Sequence[Beam]], shared: Sequence[int]
) -> list[SharedTexts]:
    """What the beams of each request hold in a model: all but the last token of each text."""
    return [
        SharedTexts(
            [[*prompt, *beam.tokens][:-1] for beam in own],
            len(prompt) + min(tokens, len(own[0].tokens) - 1),
        )
        for prompt, own, tokens in zip(prompts, beams, shared)
    ]


@torch.inference_mode()
def recompute(model: PagedModel, groups: Sequence[SharedTexts]) -> list[Int32Array]:
    """New slots that hold given texts; what the texts of a group share is run once.

    Returns:
        For each group the slots of its texts.

    Raises:
        OutOfPages: there is no room.
    """

    def run(slots: Sequence[int], chunks: Sequence[Sequence[int]]) -> None:
        rows = [i for i, chunk in enumerate(chunks) if chunk]
        tokens = [token for chunk in chunks for token in chunk]
        if rows:
            model.forward(
                [slots[i] for i in rows],
                torch.tensor(tokens, device=model.device),
                [len(chunks[i]) for i in rows],
            )

    roots = model.pool.allocate(len(groups)).tolist()
    texts = [group.texts[0][: group.shared] for group in groups]
    cached = model.pool.adopt(roots, texts)
    run(roots, [text[found:] for text, found in zip(texts, cached)])
    others = iter(model.pool.fork(roots, [len(group.texts) - 1 for group in groups]).tolist())
    slots = [[root, *(next(others) for _ in group.texts[1:])] for root, group in zip(roots, groups)]
    run(
        [slot for own in slots for slot in own],
        [text[group.shared :] for group in groups for text in group.texts],
    )
    return [np.array(own, np.int32) for own in slots]
