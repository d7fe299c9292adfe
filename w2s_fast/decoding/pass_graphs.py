"""Recorded passes that append tokens: the guides' chunks, and the first tokens of the base's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from w2s_fast._pages import round_up_tokens
from w2s_fast.attention import Bounds, Bucket, Field, Room, RowTree, StaticPlan, lay_out
from w2s_fast.cache import Int32Array, Ints, as_int32
from w2s_fast.decoding.graphs import MOST_NEW, Recordings, round_up_rows
from w2s_fast.decoding.recorder import Recorder
from w2s_fast.models import Body, PagedModel, run_body


@dataclass
class _Pass:
    """A pass of one bucket. ``hidden``: [at least its tokens, D], what comes out."""

    model: PagedModel
    body: Body
    plan: StaticPlan
    hidden: Tensor

    @property
    def tokens(self) -> Tensor:
        """int64 [T], what goes in."""
        return self.plan.more["tokens"]

    def clear(self) -> None:
        self.plan.clear()

    def run(self) -> None:
        plan = self.plan.plan
        self.plan.copy_recorded()
        hidden = run_body(self.model.view, self.tokens, plan.positions, plan, self.body)
        self.hidden[: len(hidden)].copy_(hidden)


class PassGraphs:
    """Recorded passes of one model, for few tokens: with many, a device is busy by itself.

    Attributes:
        body: what runs, maybe compiled.
    """

    def __init__(
        self,
        model: PagedModel,
        body: Body,
        recorder: Recorder,
        *,
        max_rows: int,
        max_tokens: int,
    ) -> None:
        """For up to ``max_rows`` rows and ``max_tokens`` tokens, under the kernels' attention.

        ``body``: the model's, maybe compiled.
        """
        self._model = model
        self.body = body
        self._max_rows = max_rows
        self._max_tokens = max_tokens
        self._most_pages = model.pool.max_tokens_per_slot // model.pool.page_size
        with torch.inference_mode():
            self._room = Room(model.device)
            self._hidden = torch.zeros(
                max_tokens, model.hidden_size, dtype=model.model.dtype, device=model.device
            )
        self.recordings: Recordings[Bucket, _Pass] = Recordings([model], recorder, self._prepare)

    def run(
        self,
        slots: Ints,
        tokens: Tensor | Ints,
        counts: Ints,
        tree: RowTree | None,
        copies: Int32Array,
    ) -> Tensor | None:
        """The last hidden states [T, D] of one pass; None if it has to run without: too large.

        One copy to the device where the host has the tokens, and one replay. For the arguments see
        :meth:`w2s_fast.models.PagedModel.forward`; room is reserved.
        """
        rows, count, new = len(slots), len(tokens), as_int32(counts)
        if not self.recordings.usable:
            return None
        if rows > self._max_rows or count > self._max_tokens or new.max(initial=0) > MOST_NEW:
            return None
        layout = lay_out(self._model.pool, slots, new, tree)
        padded = min(round_up_tokens(count), self._max_tokens)
        bucket = Bucket.of(
            Bounds.of(layout), round_up_rows(rows, self._max_rows), padded, self._most_pages
        )
        recording = self.recordings.find(bucket)
        static = recording.static
        if isinstance(tokens, Tensor) and tokens.device != torch.device("cpu"):
            static.plan.load(layout, copies=copies)
            static.tokens[:count].copy_(tokens)
        else:
            static.plan.load(layout, {"tokens": np.asarray(tokens, np.int64)}, copies)
        static.plan.copy_unrecorded(len(copies))
        recording.replay()
        return self._hidden[:count].clone()

    def _prepare(self, bucket: Bucket) -> _Pass:
        tokens = {"tokens": Field(torch.int64, (bucket.tokens,))}
        plan = StaticPlan.cut(bucket, self._model.pool, self._room, tokens)
        return _Pass(self._model, self.body, plan, self._hidden)
