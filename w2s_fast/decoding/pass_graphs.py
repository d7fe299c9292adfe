"""Recorded passes that append tokens: the guides' chunks, and the first tokens of the base's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from w2s_fast.attention import Bucket, KernelPlan, StaticPlan, can_be_static
from w2s_fast.decoding.graphs import Recordings, round_up_rows
from w2s_fast.decoding.recorder import Recorder
from w2s_fast.models import PagedModel, run_body


class PassGraphs:
    """Recorded passes of one model, for few tokens: with many, a device is busy by itself."""

    def __init__(
        self,
        model: PagedModel,
        body: nn.Module,
        recorder: Recorder,
        *,
        max_rows: int,
        max_tokens: int,
    ) -> None:
        """For plans of up to ``max_rows`` rows and ``max_tokens`` tokens.

        ``body``: the model's, maybe compiled.
        """
        self._model = model
        self._body = body
        self._max_rows = max_rows
        self._max_tokens = max_tokens
        with torch.inference_mode():
            self._room = StaticPlan.room(model.pool, max_rows, max_tokens)
            self._tokens = torch.zeros(max_tokens, dtype=torch.int64, device=model.device)
            self._hidden = torch.zeros(
                max_tokens, model.hidden_size, dtype=model.model.dtype, device=model.device
            )
        self.recordings = Recordings(model, recorder, self._prepare)

    def run(self, plan: object, tokens: Tensor) -> Tensor | None:
        """The last hidden states [T, D] of one pass; None if it has no recording.

        Args:
            plan: of the pass. tokens: int64 [T].
        """
        if not isinstance(plan, KernelPlan) or not can_be_static(plan):
            return None
        rows, count = len(plan.lengths), len(tokens)
        if rows > self._max_rows or count > self._max_tokens:
            return None
        padded = min(_round_up_tokens(count), self._max_tokens)
        bucket = Bucket.of(plan, round_up_rows(rows, self._max_rows), padded)
        recording = self.recordings.find(bucket)
        if recording is None:
            return None
        recording.static.load(plan)
        self._tokens[:count].copy_(tokens)
        recording.replay()
        return self._hidden[:count].clone()

    def _prepare(self, bucket: Bucket) -> tuple[StaticPlan, Callable[[], None]]:
        static, count = self._room.cut(bucket), bucket.tokens
        static.clear()
        self._tokens.zero_()

        def run() -> None:
            plan = static.plan
            tokens = self._tokens[:count]
            hidden = run_body(self._model.view, tokens, plan.positions, plan, self._body)
            self._hidden[:count].copy_(hidden)

        return static, run


def _round_up_tokens(count: int) -> int:
    """At most a quarter more: the work of a pass grows with its tokens."""
    step = 1 << max(0, count.bit_length() - 3)
    return -(-count // step) * step
