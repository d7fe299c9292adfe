"""A step of decoding at fixed addresses: append the last tokens, draw the next ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from w2s_fast._pages import PassRoom
from w2s_fast.attention import StaticPlan
from w2s_fast.decoding.draws import Draws
from w2s_fast.decoding.sampling import SamplingBatch
from w2s_fast.models import Body, PagedModel, run_body


@dataclass
class Step:
    """A step of one bucket: it begins by moving plan and sampling on.

    Attributes:
        taken: int64 [1], steps taken since the rows were loaded.
        drawn: [N + 1]; the step after ``taken`` others appends the tokens that stand there,
            and puts those that it draws behind them.
        columns: offsets of what travels with the plan, in the order of RowColumn (csrc/draw.h).
        room: where the plan lies in its buffer.
    """

    model: PagedModel
    body: Body
    vocab_size: int
    plan: StaticPlan
    sampling: SamplingBatch
    taken: Tensor
    drawn: Draws
    columns: NDArray[np.int64]
    room: PassRoom

    def clear(self) -> None:
        self.plan.clear()

    def run(self) -> None:
        plan, model = self.plan.plan, self.model
        plan.advance()
        self.sampling.advance()
        tokens = self.drawn.tokens.index_select(0, self.taken)[0]
        hidden = run_body(model.view, tokens, plan.positions, plan, self.body)
        draw = self.sampling.draw(model.logits(hidden)[:, : self.vocab_size])
        self.taken.add_(1)
        self.drawn.tokens.index_copy_(0, self.taken, draw.tokens[None])
        self.drawn.logprobs.index_copy_(0, self.taken, draw.logprobs[None])
