"""Decoding: slots of a model that grow together, a token at a time, under one plan."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from w2s_fast.attention import AttentionPlan, RowTree
from w2s_fast.cache import Ints, as_int32
from w2s_fast.errors import PageMisuse
from w2s_fast.models import PagedModel, inference, run_body


class Decoding:
    """Slots that grow together by a token at a time, under one plan.

    Room for all steps is reserved before the first one. Nothing else may be done with these slots
    until the last step is taken.
    """

    @inference
    def __init__(
        self, model: PagedModel, slots: Ints, steps: int, tree: RowTree | None = None
    ) -> None:
        """Up to ``steps`` tokens, one in each of ``slots`` at a time; ``tree``: what they share.

        Raises:
            OutOfPages: there is no room for so many tokens; nothing has changed.
        """
        self._model = model
        self._slots = as_int32(slots)
        self._one = np.ones(len(self._slots), np.int32)
        self._tree = tree
        self._plan: AttentionPlan | None = None
        if steps > 0:
            model.pool.reserve(self._slots, self._one * steps)
        self._left = steps
        self._begun = False

    @property
    def plan(self) -> AttentionPlan:
        """The plan of the pass that the last step made, or of the first one before any step.

        Made when it is first asked for: who runs all steps in our place has one of his own.
        """
        if self._plan is None:
            if self._begun or not self._left:
                raise PageMisuse("this decoding has no steps")
            self._plan = self._model.backend.make(
                self._model.pool, self._slots, self._one, self._tree, ahead=self._left - 1
            )
        return self._plan

    @inference
    def step(self, tokens: Tensor) -> Tensor:
        """Append tokens int64 [S], one to each slot: last hidden states [S, D]."""
        plan = self.next_plan()
        hidden = run_body(self._model.view, tokens, plan.positions, plan)
        self.count(1)
        return hidden

    def next_plan(self) -> AttentionPlan:
        """The plan of the next step, for who runs it in our place, and then counts it."""
        self._need(1)
        plan = self.plan
        if self._begun:
            plan.advance()
        return plan

    def count(self, steps: int) -> None:
        """Count ``steps`` tokens a slot as written, by whoever ran the plan in our place."""
        self._need(steps)
        self._begun = True
        self._left -= steps
        self._model.pool.extend(self._slots, self._one * steps)

    def _need(self, steps: int) -> None:
        if steps > self._left:
            raise PageMisuse("there is no room for another step of this decoding")
