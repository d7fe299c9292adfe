"""The guides' side of the search: new tokens are scored, in slots of the guides' models."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from w2s_fast.cache import Int32Array
from w2s_fast.models import PagedModel
from w2s_fast.search.beam import NO_GUIDE_SLOTS, NO_SLOT, Beam, Family
from w2s_fast.search.guide import PagedGuide
from w2s_fast.search.kinship import family_tree
from w2s_fast.search.recompute import recompute, shared_texts
from w2s_fast.search.request import Request
from w2s_fast.search.selection import new_tokens

_BOTH = (0, 1)  # the tuned and the untuned model of a guide


class GuideSide:
    """Scores candidates, and knows which slots they hold in the guides."""

    def __init__(self, guides: Sequence[PagedGuide]) -> None:
        self.guides = list(guides)

    @property
    def weights(self) -> list[float]:
        """The guides' weights."""
        return [guide.weight for guide in self.guides]

    def prefill(self, requests: Sequence[Request]) -> None:
        """Run the prompts of requests in their first round."""
        if not requests:
            return
        roots = [request.families[0].parent for request in requests]
        for root in roots:
            root.guide_slots = self._no_slots()
        for g, guide in enumerate(self.guides):
            slots = guide.prefill([[r.guide_prompts[g][m] for r in requests] for m in _BOTH])
            for root, own in zip(roots, slots.T):
                root.guide_slots[g] = own

    def remember(self, request: Request) -> None:
        """Let later requests find this prompt in the guides, too."""
        slots = request.families[0].children[0].guide_slots
        for g, guide in enumerate(self.guides):
            for model, slot, prompt in zip(guide.models, slots[g], request.guide_prompts[g]):
                model.pool.remember([slot], [prompt[:-1]])

    def fork(self, families: Sequence[Family]) -> None:
        """Give every child slots in all guides; the first one takes its parent's."""
        counts = [len(family.children) - 1 for family in families]
        others = [child for family in families for child in family.children[1:]]
        for child in others:
            child.guide_slots = self._no_slots()
        for g, guide in enumerate(self.guides):
            parents = np.stack([family.parent.guide_slots[g] for family in families], axis=1)
            for child, own in zip(others, guide.fork(parents, counts).T):
                child.guide_slots[g] = own
        for family in families:
            family.children[0].guide_slots = family.parent.guide_slots
            family.parent.guide_slots = NO_GUIDE_SLOTS

    def logprobs(self, rows: Sequence[tuple[Request, Beam]]) -> tuple[Tensor, Tensor]:
        """Run the rows' new tokens through all guides: float32 [guides, T], tuned and untuned."""
        chunks = [new_tokens(beam) for _, beam in rows]
        found = []
        for g, guide in enumerate(self.guides):
            slots = np.stack([beam.guide_slots[g] for _, beam in rows], axis=1)
            before = [[_last_scored(request, beam, g, m) for request, beam in rows] for m in _BOTH]
            # The guides' last token of the prompt is run with the first chunk.
            held = [[len(r.guide_prompts[g][m]) - 1 for r, _ in rows] for m in _BOTH]
            tree = family_tree(rows, held[0])
            trees = [tree, tree if held[1] == held[0] else family_tree(rows, held[1])]
            found.append(guide.append(slots, before, chunks, trees))
        tuned, untuned = (torch.stack(logprobs) for logprobs in zip(*found))
        return tuned, untuned

    def first_broken(self, tuned: Tensor, untuned: Tensor) -> PagedModel:
        """The first model whose log-prob, one for each guide, is not finite."""
        finite = torch.stack([tuned, untuned], 1).isfinite().tolist()
        return next(
            model
            for guide, both in zip(self.guides, finite)
            for model, sound in zip(guide.models, both)
            if not sound
        )

    def recompute(self, requests: Sequence[Request], alive: Sequence[Sequence[Beam]]) -> None:
        """New slots for the beams of requests that were set aside; not where no guide runs."""
        guided = [i for i, r in enumerate(requests) if r.params.uses_guides]
        own = [alive[i] for i in guided]
        shared = [requests[i].shared_tokens for i in guided]
        for g, guide in enumerate(self.guides):
            for m, model in enumerate(guide.models):
                prompts = [requests[i].guide_prompts[g][m] for i in guided]
                groups = shared_texts(prompts, own, shared)
                for beams, slots in zip(own, recompute(model, groups)):
                    for beam, slot in zip(beams, slots.tolist()):
                        if not len(beam.guide_slots):
                            beam.guide_slots = self._no_slots()
                        beam.guide_slots[g, m] = slot

    def release(self, beams: Sequence[Beam]) -> None:
        """Give back the slots of beams that hold any."""
        held = [beam for beam in beams if len(beam.guide_slots)]
        if not held:
            return
        for g, guide in enumerate(self.guides):
            for m, model in enumerate(guide.models):
                own = np.array([beam.guide_slots[g, m] for beam in held], np.int32)
                model.pool.release(own[own != NO_SLOT])  # a failed recomputation leaves gaps
        for beam in held:
            beam.guide_slots = NO_GUIDE_SLOTS

    def keep_only(self, beams: Sequence[Beam]) -> None:
        """Give back every slot of the guides that none of these beams holds."""
        held = [beam.guide_slots for beam in beams if len(beam.guide_slots)]
        for g, guide in enumerate(self.guides):
            guide.join()
            for m, model in enumerate(guide.models):
                own = [int(slots[g, m]) for slots in held]
                model.pool.release_others([slot for slot in own if slot != NO_SLOT])

    def _no_slots(self) -> Int32Array:
        return np.full((len(self.guides), 2), NO_SLOT, np.int32)


def _last_scored(request: Request, beam: Beam, g: int, m: int) -> int:
    """The token before those that are new: of the response, or of this model's prompt."""
    scored = len(beam.token_scores)
    return beam.tokens[scored - 1] if scored else request.guide_prompts[g][m][-1]
