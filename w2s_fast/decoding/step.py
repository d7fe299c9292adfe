"""A step of decoding at fixed addresses: append the last tokens, draw the next ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from w2s_fast.attention import StaticPlan
from w2s_fast.decoding.drawing import Drawing
from w2s_fast.decoding.draws import Draws
from w2s_fast.decoding.fusion import Fusion
from w2s_fast.decoding.sampling import SamplingBatch
from w2s_fast.decoding.static_passes import StaticPasses


@dataclass
class Step:
    """A step of one bucket: it begins by moving plans and sampling on.

    Attributes:
        drawing: the models that run, and how they draw.
        passes: their plans.
        sampling, fusion: settings of the rows; no fusion where one model draws.
        taken: int64 [1], steps taken since the rows were loaded.
        drawn: [N + 1]; the step after ``taken`` others appends the tokens that stand there,
            and puts those that it draws behind them.
    """

    drawing: Drawing
    passes: StaticPasses
    sampling: SamplingBatch
    fusion: Fusion | None
    taken: Tensor
    drawn: Draws

    @property
    def plans(self) -> Sequence[StaticPlan]:
        return self.passes.plans

    def clear(self) -> None:
        self.passes.clear()

    def run(self) -> None:
        for plan in self.plans:
            plan.plan.advance()
        self.sampling.advance()
        tokens = self.drawn.tokens.index_select(0, self.taken)[0]
        hidden = self.drawing.run([tokens] * len(self.plans), self.plans)
        draw, others = self.drawing.draw(hidden, self.sampling, self.fusion)
        self.taken.add_(1)
        self.drawn.tokens.index_copy_(0, self.taken, draw.tokens[None])
        self.drawn.logprobs.index_copy_(0, self.taken, draw.logprobs[None])
        if others is not None:
            self.drawn.others.index_copy_(0, self.taken, others[None])
