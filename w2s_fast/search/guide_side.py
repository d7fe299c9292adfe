"""The guides' side of the search: new tokens are scored, in slots of the guides' models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from w2s_fast._pages import Beams, fork_beams, held_slots, lay_out_chunk_rows, lay_out_chunks
from w2s_fast.models import PagedModel
from w2s_fast.search.guide import ChunkRows, PagedGuide
from w2s_fast.search.kinship import family_tree
from w2s_fast.search.recompute import recompute
from w2s_fast.search.request import Request

_BOTH = (0, 1)  # the tuned and the untuned model of a guide


class NewTokens(NamedTuple):
    """The tokens that a round brought, and what the guides say of them.

    Attributes:
        tokens: int64 [T]. tuned, untuned: float32 [guides, T].
    """

    tokens: Tensor
    tuned: Tensor
    untuned: Tensor


class GuideSide:
    """Scores candidates in the guides."""

    def __init__(self, guides: Sequence[PagedGuide]) -> None:
        self.guides = list(guides)

    @property
    def weights(self) -> list[float]:
        """The guides' weights."""
        return [guide.weight for guide in self.guides]

    def models(self) -> Iterator[tuple[int, int, int, PagedModel]]:
        """Of each model its guide, whether it is the untuned one, its place among the models of a
        request's beams, and itself."""
        for g, guide in enumerate(self.guides):
            for m, model in enumerate(guide.models):
                yield g, m, 1 + 2 * g + m, model

    def prefill(self, requests: Sequence[Request]) -> None:
        """Run the prompts of requests in their first round."""
        if not requests:
            return
        for g, guide in enumerate(self.guides):
            slots = guide.prefill([[r.guide_prompts[g][m] for r in requests] for m in _BOTH])
            for request, own in zip(requests, slots.T):
                for m, slot in enumerate(own):
                    request.beams.set_root_slot(1 + 2 * g + m, slot)

    def remember(self, requests: Sequence[Request]) -> None:
        """Let later requests find these prompts in the guides, too."""
        for g, m, index, model in self.models():
            # The first child has its parent's pages.
            model.pool.remember(
                [request.beams.slot_of_first(index) for request in requests],
                [request.guide_prompts[g][m][:-1] for request in requests],
            )

    def logprobs(self, requests: Sequence[Request]) -> NewTokens:
        """Give every candidate slots, and run its new tokens through all guides."""
        beams = [request.beams for request in requests]
        for _, _, index, model in self.models():
            model.pool.copy_pages(fork_beams(beams, model.pool.manager, index))
        counts, new = lay_out_chunks(beams)
        device = self.guides[0].models[0].device
        tokens = torch.from_numpy(new).to(device, non_blocking=True)
        found = [
            guide.score(tokens, counts, [_rows(beams, 1 + 2 * g + m) for m in _BOTH])
            for g, guide in enumerate(self.guides)
        ]
        tuned, untuned = (torch.stack(logprobs) for logprobs in zip(*found))
        return NewTokens(tokens, tuned, untuned)

    def first_broken(self, tuned: Tensor, untuned: Tensor) -> PagedModel:
        """The first model whose log-prob, one for each guide, is not finite."""
        finite = torch.stack([tuned, untuned], 1).isfinite().tolist()
        return next(
            model
            for guide, both in zip(self.guides, finite)
            for model, sound in zip(guide.models, both)
            if not sound
        )

    def recompute(self, requests: Sequence[Request]) -> None:
        """New slots for the hypotheses of requests that were set aside; not where no guide runs."""
        guided = [request for request in requests if request.params.uses_guides]
        for g, m, index, model in self.models():
            slots = recompute(model, guided, [r.guide_prompts[g][m] for r in guided])
            for request, own in zip(guided, slots):
                request.beams.set_kept_slots(index, own)

    def keep_only(self, requests: Sequence[Request]) -> None:
        """Give back every slot of the guides that none of these requests holds."""
        beams = [request.beams for request in requests]
        for guide in self.guides:
            guide.join()
        for _, _, index, model in self.models():
            model.pool.release_others(held_slots(beams, index))


def _rows(beams: Sequence[Beams], index: int) -> ChunkRows:
    slots, inputs, levels = lay_out_chunk_rows(beams, index)
    return ChunkRows(slots, inputs, family_tree(levels))
