"""Drawing: the models that draw together, run side by side, and from their states to tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from w2s_fast.attention import StaticPlan, brought
from w2s_fast.decoding.draws import Draw
from w2s_fast.decoding.fusion import Fusion, GuideRoles
from w2s_fast.decoding.lane import Lane
from w2s_fast.decoding.sampling import SamplingBatch
from w2s_fast.models import Body, Groups, PagedModel, run_body


class Drawing(NamedTuple):
    """Models that draw together; most often it is the base alone.

    Attributes:
        groups: of the models, the base first. bodies: what runs for each that runs alone.
        guides: of which the logits are fused; none where the base draws alone.
        vocab_size: ids from here on are never sampled.
        lane: where the others run, beside the base.
    """

    groups: Groups
    bodies: Sequence[Body]
    guides: GuideRoles
    vocab_size: int
    lane: Lane

    @property
    def models(self) -> Sequence[PagedModel]:
        return self.groups.models

    def run(self, tokens: Sequence[Tensor], plans: Sequence[StaticPlan]) -> list[Tensor]:
        """The last hidden states of each model's tokens."""

        def run(g: int) -> list[Tensor]:
            members, together = self.groups.members[g], self.groups.together[g]
            new = sum(len(tokens[m]) for m in members)
            if together is not None and new <= together.most_tokens:
                own = [plans[m].plan for m in members]
                return together.run([tokens[m] for m in members], own)
            return [alone(m) for m in members]

        def alone(m: int) -> Tensor:
            plan = plans[m].plan
            return run_body(self.models[m].view, tokens[m], plan.positions, plan, self.bodies[m])

        if len(self.groups.members) == 1:
            return run(0)
        try:
            with self.lane.beside():
                others = [run(g) for g in range(1, len(self.groups.members))]
            base = run(0)
        finally:
            self.lane.join()
        return self.groups.in_order([base, *others])

    def draw(
        self,
        hidden: Sequence[Tensor],
        sampling: SamplingBatch,
        fusion: Fusion | None,
        source: Tensor | None = None,
    ) -> tuple[Draw, Tensor | None]:
        """Draw a token for each of S rows.

        Args:
            hidden: of each model [S, D], or [N, D] where ``source`` int64 [S] says of which a row
                is.

        Returns:
            What was drawn; and the other models' log-probs of it, float32 [M - 1, S].
        """
        logits = [self.logits(m, own) for m, own in enumerate(hidden)]
        if source is not None:
            logits = [own.index_select(0, source) for own in logits]
        return self.draw_from(logits, sampling, fusion)

    def draw_from(
        self, logits: Sequence[Tensor], sampling: SamplingBatch, fusion: Fusion | None
    ) -> tuple[Draw, Tensor | None]:
        """The same from logits of each model [S, V], on its device; drawn is on the base's."""
        if fusion is None:
            return sampling.draw(logits[0]), None
        here = [brought(own, logits[0].device) for own in logits]
        return fusion.draw(here, self.guides, sampling)

    def logits(self, model: int, hidden: Tensor) -> Tensor:
        """Hidden states [N, D] of a model -> logits [N, vocab_size]."""
        return self.models[model].logits(hidden)[:, : self.vocab_size]
