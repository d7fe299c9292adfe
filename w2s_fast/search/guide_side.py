"""The guides' side of the search: new tokens are scored, in slots of the guides' models."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from w2s_fast._pages import fork_beams, held_slots, lay_out_scoring
from w2s_fast.attention import to_device
from w2s_fast.cache import NO_COPIES
from w2s_fast.decoding import Draws
from w2s_fast.models import PagedModel
from w2s_fast.search.guide import ChunkRows, GuidePartials, PagedGuide
from w2s_fast.search.kinship import family_tree
from w2s_fast.search.recompute import recompute
from w2s_fast.search.request import Request
from w2s_fast.search.selection import Selection, select

_BOTH = (0, 1)  # the tuned and the untuned model of a guide


class GuideSide:
    """Scores candidates in the guides."""

    def __init__(self, guides: Sequence[PagedGuide]) -> None:
        self.guides = list(guides)

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

    def score(
        self,
        requests: Sequence[Request],
        drawing: Sequence[Request],
        drawn: Draws | None,
        again: bool = False,
    ) -> Selection:
        """Give all candidates slots, run their new tokens through all guides, and select.

        Args:
            requests: each with a round that is complete.
            drawing: those whose growing candidates are the rows of ``drawn``, in their order.
            drawn: tokens that complete these rounds, and that the host does not know yet; None: it
                has them all.
            again: they have slots; what was run there in this round is taken back.
        """
        beams = [request.beams for request in requests]
        copies = [
            NO_COPIES if again else fork_beams(beams, model.pool.manager, index)
            for _, _, index, model in self.models()
        ]
        steps = 0 if drawn is None else len(drawn)
        tokens, logprobs, counts, targets, rows, columns, most, width = lay_out_scoring(
            beams, [request.beams for request in drawing], steps
        )
        if again:
            for (slots, _, (_, (_, inherited))), (*_, model) in zip(rows, self.models()):
                model.pool.truncate(slots, inherited)
        there = to_device(
            {
                "tokens": tokens,
                "logprobs": logprobs,
                "targets": targets,
                **{f"inputs{m}": inputs for m, (_, inputs, _) in enumerate(rows)},
                **columns,
                "weights": np.array([guide.weight for guide in self.guides], np.float64),
            },
            self.guides[0].models[0].device,
        )
        all_tokens, all_logprobs = there.pop("tokens"), there.pop("logprobs")
        if drawn is not None:
            all_tokens = torch.cat([*drawn.tokens, all_tokens])
            all_logprobs = torch.cat([*drawn.logprobs, all_logprobs])
        index = there.pop("targets")
        new = all_tokens.index_select(0, index)
        inputs = [all_tokens.index_select(0, there.pop(f"inputs{m}")) for m in range(len(rows))]
        found = []
        for g, guide in enumerate(self.guides):
            own = [
                ChunkRows(rows[m][0], inputs[m], family_tree(rows[m][2]), copies[m])
                for m in (2 * g, 2 * g + 1)
            ]
            found.append(guide.score(new, counts, own))
        return select(
            found,
            new,
            all_logprobs.index_select(0, index),
            there.pop("weights"),
            there,
            columns["cu_tokens"],
            most,
            width,
        )

    def first_broken(self, guides: Sequence[GuidePartials], token: int) -> PagedModel:
        """The first model whose log-prob of a token is not finite."""
        return next(
            model
            for guide, both in zip(self.guides, guides)
            for model, partials in zip(guide.models, both)
            if not math.isfinite(partials.logprobs()[token])
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
