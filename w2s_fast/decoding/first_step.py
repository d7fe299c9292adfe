"""What comes before steps, at fixed addresses: first tokens, of rows that are yet to be forked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from w2s_fast._pages import PassRoom
from w2s_fast.attention import StaticPlan
from w2s_fast.decoding.step import Step
from w2s_fast.models import run_body


@dataclass
class FirstStep:
    """Sources run, and their children's first tokens are drawn.

    Attributes:
        sources: where the sources' pass is loaded, with ``tokens`` int64 [T], what they run;
            ``last`` int64 [N], which of them is each source's last; and ``source`` int64 [S], of
            which source a row is.
        columns: offsets of these three. step: of the rows.
        room: where the pass lies in the buffer of ``sources``.
    """

    step: Step
    sources: StaticPlan
    columns: NDArray[np.int64]
    room: PassRoom

    def clear(self) -> None:
        self.step.clear()
        self.sources.clear()

    def run(self) -> None:
        step, plan, more = self.step, self.sources.plan, self.sources.more
        hidden = run_body(step.model.view, more["tokens"], plan.positions, plan, step.body)
        logits = step.model.logits(hidden.index_select(0, more["last"]))[:, : step.vocab_size]
        step.plan.copy_recorded()
        step.drawn.put(0, step.sampling.draw(logits.index_select(0, more["source"])))
