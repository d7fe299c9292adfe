"""The guides' side of the search: new tokens are scored, in slots of the guides' models."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from w2s_fast._pages import ScoringLayout, fork_in_guides, held_slots
from w2s_fast.attention import Columns, RowTree, host_buffer
from w2s_fast.cache import NO_COPIES, Int32Array
from w2s_fast.decoding import Draws, Lane
from w2s_fast.kernels.score_select import score_select
from w2s_fast.models import Groups, PagedModel
from w2s_fast.search.entrance import enter
from w2s_fast.search.guide import ChunkRows, PagedGuide, partials_of, roles_of, score_chunks
from w2s_fast.search.request import Request
from w2s_fast.search.score_graphs import ScoreGraphs
from w2s_fast.search.selection import Selection


class GuideSide:
    """Scores candidates in the guides."""

    def __init__(
        self,
        guides: Sequence[PagedGuide],
        models: Sequence[PagedModel],
        vocab_size: int,
        graphs: ScoreGraphs | None = None,
    ) -> None:
        """With the models of a search, the base first. ``vocab_size``: ids from here on are
        padding. ``graphs``: recorded selections of these guides."""
        self.guides = list(guides)
        self.roles = roles_of(guides, models)
        self.weights = [guide.weight for guide in guides]
        self._vocab_size = vocab_size
        self._graphs = graphs
        self._device = models[0].device
        self._agree = models[0].agree
        self._models = list(enumerate(models))[1:]  # by their roles
        self._lane = Lane(*(model.device for model in models))
        self._managers = [model.pool.manager for _, model in self._models]
        self._groups = Groups(models[1:])

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
        for index, model in self._models:
            prompts = [request.prompts[index] for request in requests]
            entered = enter(model, index, requests, prompts, most[index])
            most[index] = entered.left
            waiting.update(entered.waiting)
        return waiting

    def remember(self, requests: Sequence[Request]) -> None:
        """Let later requests find these prompts in the guides, too."""
        if not requests:
            return
        for index, model in self._models:
            # The first child has its parent's pages.
            model.pool.remember(
                [request.beams.slot_of_first(index) for request in requests],
                [request.prompts[index][:-1] for request in requests],
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
        copies = [NO_COPIES] * len(self._models)
        if not again:
            copies = fork_in_guides(beams, self._managers)
        layout = ScoringLayout(
            beams,
            [request.beams for request in drawing],
            0 if drawn is None else len(drawn),
            self.weights,
        )
        # Where texts have ended before their first new token, slots were forked that run nothing:
        # with the others there is room for a copy a row.
        for m, (_, model) in enumerate(self._models):
            if len(copies[m]) > layout.num_rows:
                model.pool.copy_pages(copies[m])
                copies[m] = NO_COPIES
        if not again and self._graphs is not None:
            replayed = self._graphs.run(layout, drawn, copies)
            if replayed is not None:
                return replayed
        return self._score(layout, drawn, copies, again)

    def _score(
        self, layout: ScoringLayout, drawn: Draws | None, copies: list[Int32Array], again: bool
    ) -> Selection:
        """The same where the models run by themselves."""
        laid_out = layout.rows
        if again:
            for (slots, _, held), (_, model) in zip(laid_out, self._models):
                model.pool.truncate(slots, held)
        columns = self._columns(layout)
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
            for m, (slots, tree, _) in enumerate(laid_out)
        ]
        partials = score_chunks(
            self._groups,
            self._lane,
            new,
            layout.counts,
            rows,
            self._vocab_size,
        )
        own = logprobs.index_select(0, targets)
        guides = partials_of(self.roles, partials, own)
        rounds, candidates, *_, max_candidates, max_width = layout.sizes
        packed = score_select(
            guides,
            tokens=new,
            logprobs=own,
            **columns,
            max_candidates=max_candidates,
            max_width=max_width,
        )
        self._agree(packed)
        shape = (rounds, candidates, len(new), max_width)
        return Selection(packed, shape, layout.cu_tokens, guides)

    def _columns(self, layout: ScoringLayout) -> dict[str, Tensor]:
        """All columns of a selection, in one copy to the device."""
        columns = Columns(layout.columns)
        buffer = host_buffer(columns.nbytes, self._device)
        layout.write(buffer.numpy(), columns.offsets, columns.items, layout.num_drawn, [])
        return columns.cut(buffer.to(self._device, non_blocking=True))

    def first_broken(self, selection: Selection, token: int) -> PagedModel:
        """The first model whose log-prob of a token is not finite."""
        return next(
            model
            for guide, both in zip(self.guides, selection.guides or [])
            for model, partials in zip(guide.models, both)
            if not math.isfinite(partials.logprobs()[token])
        )

    def keep_only(self, requests: Sequence[Request]) -> None:
        """Give back every slot of the guides that none of these requests holds."""
        beams = [request.beams for request in requests]
        self._lane.join()
        if self._graphs is not None:
            self._graphs.join()
        for guide in self.guides:
            guide.join()
        for index, model in self._models:
            model.pool.release_others(held_slots(beams, index))
