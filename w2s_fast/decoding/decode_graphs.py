"""Recorded steps of decoding: append the last tokens, draw the next ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from w2s_fast.attention import Bounds, Bucket, Field, Room, RowTree, StaticPlan, lay_out
from w2s_fast.cache import NO_COPIES, Int32Array, Ints
from w2s_fast.decoding.draws import Draws
from w2s_fast.decoding.graphs import Recordings, round_up_rows, rows_recorded
from w2s_fast.decoding.recorder import Recorder
from w2s_fast.decoding.sampling import SamplingBatch, SamplingColumns, sampling_fields
from w2s_fast.models import PagedModel, inference, run_body

# Steps whose draws stay on the device at once; of more, what was drawn is put away in between.
_STEPS = 64


@dataclass
class _Step:
    """A step of one bucket: it begins by moving plan and sampling on.

    Attributes:
        taken: int64 [1], steps taken since the rows were loaded.
        drawn: [_STEPS + 1]; the step after ``taken`` others appends the tokens that stand there,
            and puts those that it draws behind them.
    """

    model: PagedModel
    body: nn.Module
    vocab_size: int
    plan: StaticPlan
    sampling: SamplingBatch
    taken: Tensor
    drawn: Draws

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
        """For up to ``max_rows`` rows, under the kernels' attention.

        Args:
            body: the model's, maybe compiled.
            vocab_size: ids from here on are never sampled.
        """
        self._model = model
        self._body = body
        self._max_rows = max_rows
        self._vocab_size = vocab_size
        self._most_pages = model.pool.max_tokens_per_slot // model.pool.page_size
        with torch.inference_mode():
            self._room = Room(model.device)
            # By rows. What is in them was drawn: spare rows, too, append what can be embedded.
            self._drawn: dict[int, Draws] = {}
        self.recordings = Recordings(model, recorder, self._prepare)

    @inference
    def warm_up(self) -> None:
        """Record the smallest bucket for each number of rows, before any request waits for it."""
        # The largest first: the others find room in the memory that it left behind.
        for rows in reversed(rows_recorded(self._max_rows)):
            self.recordings.make(Bucket.smallest(rows, rows, 1, self._most_pages))

    @inference
    def run(
        self,
        slots: Ints,
        tree: RowTree,
        sampling: SamplingColumns,
        logits: Tensor,
        steps: int,
        copies: Int32Array = NO_COPIES,
    ) -> Draws | None:
        """What :meth:`Decoder.run` does, in one copy to the device, one draw, and replays.

        Args:
            slots: S slots with room for all tokens but the last. tree: what they share.
            sampling: settings of S rows.
            logits: [S, V], from which the first tokens are drawn.
            steps: at least two. copies: pages to be copied before the second step.

        Returns:
            What each step drew; None if these rows have to run without: nothing has happened.
        """
        rows = len(slots)
        if rows > self._max_rows:
            return None
        one = np.ones(rows, np.int32)
        layout = lay_out(self._model.pool, slots, one, tree, ahead=steps - 2)
        padded = round_up_rows(rows, self._max_rows)
        bucket = Bucket.of(Bounds.of(layout), padded, padded, self._most_pages)
        recording = self.recordings.find(bucket)
        if recording is None:
            return None
        step = recording.static
        step.plan.load(layout, sampling._asdict(), copies, back=True)
        drawn = Draws(step.drawn.memory, rows, padded)
        drawn.put(0, step.sampling.first(rows).draw(logits))
        found, left = [], steps - 1
        while left:
            count = min(left, _STEPS)
            for _ in range(count):
                recording.replay()
            left -= count
            # The last draw stays, to be the first of what follows.
            found.append(drawn.memory[: count + (left == 0)].clone())
            if left:
                drawn.memory[0].copy_(drawn.memory[count])
                step.taken.zero_()
        return Draws(found[0] if len(found) == 1 else torch.cat(found), rows, padded)

    def _prepare(self, bucket: Bucket) -> _Step:
        rows = bucket.rows
        settings = sampling_fields(rows)
        more = {**settings, "taken": Field(torch.int64, (1,))}
        plan = StaticPlan.cut(bucket, self._model.pool, self._room, more)
        if rows not in self._drawn:
            self._drawn[rows] = Draws.empty(_STEPS + 1, rows, self._model.device)
            self._drawn[rows].memory.zero_()
        return _Step(
            model=self._model,
            body=self._body,
            vocab_size=self._vocab_size,
            plan=plan,
            sampling=SamplingBatch(*(plan.more[name] for name in settings)),
            taken=plan.more["taken"],
            drawn=self._drawn[rows],
        )
