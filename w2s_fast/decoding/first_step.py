"""What comes before steps, at fixed addresses: first tokens, of rows that are yet to be forked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from w2s_fast.decoding.static_passes import StaticPasses
from w2s_fast.decoding.step import Step


@dataclass
class FirstStep:
    """Sources run, and their children's first tokens are drawn.

    Attributes:
        step: of the rows.
        passes: where the sources' passes are loaded.
        tokens: int64 [T] of each model, what they run. last: int64 [N] of each, which of them is
            each source's last. source: int64 [S], of which source a row is.
    """

    step: Step
    passes: StaticPasses
    tokens: Sequence[Tensor]
    last: Sequence[Tensor]
    source: Tensor

    def clear(self) -> None:
        self.step.clear()
        self.passes.clear()

    def run(self) -> None:
        step = self.step
        hidden = step.drawing.run(self.tokens, self.passes.plans)
        ends = [own.index_select(0, last) for own, last in zip(hidden, self.last)]
        for plan in step.plans:
            plan.copy_recorded()
        draw, others = step.drawing.draw(ends, step.sampling, step.fusion, self.source)
        step.drawn.put(0, draw, others)
