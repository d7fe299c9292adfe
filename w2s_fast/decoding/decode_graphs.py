"""Recorded steps of decoding: append the last tokens, draw the next ones."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from w2s_fast._pages import DrawLayout
from w2s_fast.attention import (
    SPLIT_KEYS,
    SPLIT_QUERIES,
    Bounds,
    Bucket,
    Field,
    Room,
    RowTree,
    StaticPlan,
    host_buffer,
    launch_copy,
    lay_out,
)
from w2s_fast.cache import NO_COPIES, Int32Array, Ints
from w2s_fast.decoding.draws import Draws
from w2s_fast.decoding.first_step import FirstStep
from w2s_fast.decoding.graphs import (
    MOST_NEW,
    Recording,
    Recordings,
    round_up_rows,
    round_up_tokens,
    rows_recorded,
)
from w2s_fast.decoding.recorder import Recorder
from w2s_fast.decoding.sampling import SamplingBatch, SamplingColumns, sampling_fields
from w2s_fast.decoding.step import Step
from w2s_fast.models import Body, PagedModel, inference

# Steps whose draws stay on the device at once; of more, what was drawn is put away in between.
_STEPS = 64


class DecodeGraphs:
    """Recorded steps of one model. Within a chunk the host only says "again".

    Attributes:
        recorder: what else it records must not run at the same time.
    """

    def __init__(
        self,
        model: PagedModel,
        body: Body,
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
        self.recorder = recorder
        self._model = model
        self._body = body
        self._max_rows = max_rows
        self._vocab_size = vocab_size
        self._most_pages = model.pool.max_tokens_per_slot // model.pool.page_size
        with torch.inference_mode():
            self._room, self._room_of_sources = Room(model.device), Room(model.device)
            # By rows. What is in them was drawn: spare rows, too, append what can be embedded.
            self._drawn: dict[int, Draws] = {}
        self.recordings: Recordings[Bucket, Step]
        self.recordings = Recordings([model], recorder, self._prepare)
        # By the buckets of the sources and of the rows.
        self.firsts: Recordings[tuple[Bucket, Bucket], FirstStep]
        self.firsts = Recordings([model], recorder, self._prepare_first)

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
        if rows > self._max_rows or not self.recordings.usable:
            return None
        one = np.ones(rows, np.int32)
        layout = lay_out(self._model.pool, slots, one, tree, ahead=steps - 2)
        padded = round_up_rows(rows, self._max_rows)
        bucket = Bucket.of(Bounds.of(layout), padded, padded, self._most_pages)
        recording = self.recordings.find(bucket)
        step = recording.static
        step.plan.load(layout, sampling._asdict(), copies, back=True)
        step.plan.copy_pages(len(copies))
        drawn = Draws(step.drawn.memory, rows, padded)
        drawn.put(0, step.sampling.first(rows).draw(logits))
        return self._replay(recording, drawn, steps)

    def begin(self, layout: DrawLayout, steps: int) -> Draws | None:
        """Run what rows come from, draw their first tokens, and ``steps`` - 1 more.

        In two copies to the device, and replays. All that is appended counts in the pool then.

        Returns:
            What each step drew; None if it has to be done without: nothing has happened.

        Raises:
            OutOfPages: in the middle of it.
            UnsupportedModel: the caller has made another model of it.
        """
        rows, most = layout.rows, self._max_rows
        if steps < 2 or rows > most or layout.tokens > most or layout.max_new > MOST_NEW:
            return None
        if not (self.recordings.usable and self.firsts.usable):
            return None
        self._model.check()
        layout.begin(steps, SPLIT_KEYS, SPLIT_QUERIES)
        of_sources, of_rows = (Bounds(*bounds) for bounds in layout.bounds)
        padded = round_up_rows(rows, most)
        bucket = Bucket.of(of_rows, padded, padded, self._most_pages)
        sources = Bucket.of(
            of_sources,
            round_up_rows(of_sources.rows, most),
            min(round_up_tokens(of_sources.tokens), most),
            self._most_pages,
        )
        # Few shapes: what there is room for depends on the rows alone, as long as that is enough.
        sources = sources._replace(
            splits=max(sources.splits, bucket.splits if sources.splits else 0),
            pages=max(sources.pages, bucket.pages),
        )
        recording, first = self.recordings.find(bucket), self.firsts.find((sources, bucket))
        step, before = recording.static, first.static
        if layout.num_before:
            self._model.pool.copy_pages(layout.before)
        device = self._model.device
        host = host_buffer(step.plan.nbytes, device)
        layout.write_rows(host.numpy(), step.room, step.columns)
        launch_copy(host, step.plan.buffer)
        host = host_buffer(before.sources.nbytes, device)
        layout.write_sources(host.numpy(), before.room, before.columns, padded)
        launch_copy(host, before.sources.buffer)
        first.replay()
        step.plan.copy_unrecorded(layout.num_copies)
        return self._replay(recording, Draws(step.drawn.memory, rows, padded), steps)

    def _replay(self, recording: Recording[Step], drawn: Draws, steps: int) -> Draws:
        """All steps but the first, whose tokens stand in ``drawn``.

        Of so many steps as are kept, what is returned stands where it was drawn: it is to be read
        or copied before these rows, or as many others, are drawn again.
        """
        put_away = []
        for left in range(steps - 1, 0, -_STEPS):
            for _ in range(min(left, _STEPS)):
                recording.replay()
            if left > _STEPS:
                put_away.append(drawn.memory[:_STEPS].clone())
                # The last draw is the first of what follows.
                drawn.memory[0].copy_(drawn.memory[_STEPS])
                recording.static.taken.zero_()
        memory = drawn.memory[: left + 1]
        return Draws(torch.cat([*put_away, memory]) if put_away else memory, drawn.rows, drawn.room)

    def _prepare(self, bucket: Bucket) -> Step:
        rows = bucket.rows
        settings = sampling_fields(rows)
        more = {**settings, "taken": Field(torch.int64, (1,))}
        plan = StaticPlan.cut(bucket, self._model.pool, self._room, more)
        if rows not in self._drawn:
            self._drawn[rows] = Draws.empty(_STEPS + 1, rows, self._model.device)
            self._drawn[rows].memory.zero_()
        return Step(
            model=self._model,
            body=self._body,
            vocab_size=self._vocab_size,
            plan=plan,
            sampling=SamplingBatch(*(plan.more[name] for name in settings)),
            taken=plan.more["taken"],
            drawn=self._drawn[rows],
            columns=plan.made.fields.offsets_of([*more, "copies"]),
            room=plan.made.room_at(0),
        )

    def _prepare_first(self, buckets: tuple[Bucket, Bucket]) -> FirstStep:
        of_sources, of_rows = buckets
        columns = {
            "tokens": Field(torch.int64, (of_sources.tokens,)),
            "last": Field(torch.int64, (of_sources.rows,)),
            "source": Field(torch.int64, (of_rows.rows,)),
        }
        plan = StaticPlan.cut(of_sources, self._model.pool, self._room_of_sources, columns)
        return FirstStep(
            step=self.recordings.static_of(of_rows),
            sources=plan,
            columns=plan.made.fields.offsets_of(columns),
            room=plan.made.room_at(0),
        )
