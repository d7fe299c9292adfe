"""Recorded steps of decoding: append the last tokens, draw the next ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from w2s_fast.attention import Bucket, KernelPlan, StaticPlan
from w2s_fast.decoding.graphs import Recordings, round_up_rows, rows_recorded
from w2s_fast.decoding.recorder import Recorder
from w2s_fast.decoding.sampling import Draw, SamplingBatch
from w2s_fast.models import PagedModel, run_body


class _Step(NamedTuple):
    """What a recorded step reads and writes; it begins by moving ``plan`` and ``sampling`` on."""

    plan: StaticPlan
    sampling: SamplingBatch
    drawn: Draw  # the last tokens, which the next ones replace


class DecodeGraphs:
    """Recorded steps of one model. Within a chunk the host only says "again"."""

    def __init__(
        self,
        model: PagedModel,
        body: nn.Module,
        recorder: Recorder,
        *,
        max_rows: int,
        vocab_size: int,
    ) -> None:
        """For plans of up to ``max_rows`` rows.

        Args:
            body: the model's, maybe compiled.
            vocab_size: ids from here on are never sampled.
        """
        self._model = model
        self._body = body
        self._max_rows = max_rows
        self._vocab_size = vocab_size
        with torch.inference_mode():
            self._room = StaticPlan.room(model.pool, max_rows, max_rows)
            self._sampling = SamplingBatch.empty(max_rows, model.device)
            tokens = torch.zeros(max_rows, dtype=torch.int64, device=model.device)
            self._drawn = Draw(tokens, torch.zeros_like(tokens, dtype=torch.float32))
        self.recordings = Recordings(model, recorder, self._prepare)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Record the smallest bucket for each number of rows, before any request waits for it."""
        # The largest first: the others find room in the memory that it left behind.
        for rows in reversed(rows_recorded(self._max_rows)):
            self.recordings.make(Bucket.smallest(rows, rows, max_q=1))

    @torch.inference_mode()
    def run(
        self, plan: object, sampling: SamplingBatch, tokens: Tensor, steps: int
    ) -> list[Draw] | None:
        """Append ``tokens``, draw the next ones, and so on for ``steps`` steps.

        Args:
            plan: before its first pass; it is not moved on.
            sampling: for the tokens behind ``tokens``; likewise.
            tokens: int64 [S].

        Returns:
            What each step drew; None if this plan has no recording: nothing has happened.
        """
        rows = len(tokens)
        if not isinstance(plan, KernelPlan) or rows > self._max_rows:
            return None
        padded = round_up_rows(rows, self._max_rows)
        recording = self.recordings.find(Bucket.of(plan, padded, padded))
        if recording is None:
            return None
        step = recording.static
        step.plan.load(plan)
        step.plan.step_back()
        for ours, column in zip(step.sampling.columns, sampling.columns):
            ours[:rows].copy_(column)
        step.sampling.position.sub_(1)
        step.drawn.tokens[:rows].copy_(tokens)
        drawn = []
        for _ in range(steps):
            recording.replay()
            drawn.append(Draw(*(column[:rows].clone() for column in step.drawn)))
        return drawn

    def _prepare(self, bucket: Bucket) -> tuple[_Step, Callable[[], None]]:
        rows, plan = bucket.rows, self._room.cut(bucket)
        step = _Step(plan, self._sampling.first(rows), Draw(*(x[:rows] for x in self._drawn)))
        plan.clear()
        # The most likely token for all, until others come: settings have to be allowed ones.
        for column in (*step.sampling.columns, *step.drawn):
            column.zero_()
        step.sampling.top_p.fill_(1.0)
        return step, lambda: self._take(step)

    def _take(self, step: _Step) -> None:
        plan, model = step.plan.plan, self._model
        plan.advance()
        step.sampling.advance()
        hidden = run_body(model.view, step.drawn.tokens, plan.positions, plan, self._body)
        drawn = step.sampling.draw(model.logits(hidden)[:, : self._vocab_size])
        for ours, column in zip(step.drawn, drawn):
            ours.copy_(column)
