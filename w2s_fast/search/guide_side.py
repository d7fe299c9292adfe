"""The guides' side of the search: new tokens are scored, in slots of the guides' models."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from w2s_fast._pages import ScoringLayout, fork_beams, held_slots
from w2s_fast.attention import RowTree, cut_buffer, host_buffer
from w2s_fast.cache import NO_COPIES
from w2s_fast.decoding import Draws
from w2s_fast.kernels.score_select import score_select
from w2s_fast.models import PagedModel
from w2s_fast.search.entrance import enter
from w2s_fast.search.guide import ChunkRows, GuidePartials, PagedGuide
from w2s_fast.search.request import Request
from w2s_fast.search.selection import Selection


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

    def prefill(self, requests: Sequence[Request], most: list[int]) -> set[Request]:
        """Run texts of requests that cannot be scored, or go on, before they stand.

        Args:
            requests: in their first round, those whose chunks are complete; and others that come
                back after they were set aside. Of those without guides, none.
            most: tokens that each model may still run in this step.

        Returns:
            Those whose texts do not all stand yet.
        """
        waiting: set[Request] = set()
        if not requests:
            return waiting
        for g, m, index, model in self.models():
            prompts = [request.guide_prompts[g][m] for request in requests]
            entered = enter(model, index, requests, prompts, most[index])
            most[index] = entered.left
            waiting.update(entered.waiting)
        return waiting

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
        layout = ScoringLayout(
            beams,
            [request.beams for request in drawing],
            0 if drawn is None else len(drawn),
            [guide.weight for guide in self.guides],
        )
        if again:
            for (slots, _, held), (*_, model) in zip(layout.rows, self.models()):
                model.pool.truncate(slots, held)
        device = self.guides[0].models[0].device
        buffer = host_buffer(layout.nbytes, device)
        layout.write(buffer.numpy())
        columns = cut_buffer(buffer.to(device, non_blocking=True), layout.fields)
        tokens, logprobs = columns.pop("tokens"), columns.pop("logprobs")
        if drawn is not None:
            tokens = torch.cat([*drawn.tokens, tokens])
            logprobs = torch.cat([*drawn.logprobs, logprobs])
        targets = columns.pop("targets")
        new = tokens.index_select(0, targets)
        rows = [
            ChunkRows(
                slots,
                tokens.index_select(0, columns.pop(f"inputs{m}")),
                RowTree(*tree),
                copies[m],
            )
            for m, (slots, tree, _) in enumerate(layout.rows)
        ]
        partials = [
            guide.score(new, layout.counts, rows[2 * g : 2 * g + 2])
            for g, guide in enumerate(self.guides)
        ]
        shape = (len(columns["width"]), len(columns["previous"]), len(new), layout.max_width)
        packed = score_select(
            partials,
            tokens=new,
            logprobs=logprobs.index_select(0, targets),
            **columns,
            max_candidates=layout.max_candidates,
            max_width=layout.max_width,
        )
        return Selection(packed, shape, layout.cu_tokens, partials)

    def first_broken(self, guides: Sequence[GuidePartials], token: int) -> PagedModel:
        """The first model whose log-prob of a token is not finite."""
        return next(
            model
            for guide, both in zip(self.guides, guides)
            for model, partials in zip(guide.models, both)
            if not math.isfinite(partials.logprobs()[token])
        )

    def keep_only(self, requests: Sequence[Request]) -> None:
        """Give back every slot of the guides that none of these requests holds."""
        beams = [request.beams for request in requests]
        for guide in self.guides:
            guide.join()
        for _, _, index, model in self.models():
            model.pool.release_others(held_slots(beams, index))
