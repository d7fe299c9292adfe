"""Recorded steps of decoding: append the last tokens, draw the next ones."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import starmap
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from w2s_fast._pages import DrawLayout
from w2s_fast.attention import (
    SPLIT_KEYS,
    SPLIT_QUERIES,
    SPLIT_RULE,
    Bounds,
    Bucket,
    Field,
    Room,
    lay_out,
)
from w2s_fast.decoding.drawing import Drawing
from w2s_fast.decoding.draws import Draws
from w2s_fast.decoding.first_step import FirstStep
from w2s_fast.decoding.fusion import Fusion, FusionColumns, fusion_fields
from w2s_fast.decoding.graphs import (
    MOST_NEW,
    Recording,
    Recordings,
    round_up_rows,
    rows_recorded,
)
from w2s_fast.decoding.growing_rows import GrowingRows
from w2s_fast.decoding.recorder import Recorder
from w2s_fast.decoding.sampling import SamplingBatch, SamplingColumns, sampling_fields
from w2s_fast.decoding.static_passes import StaticPasses
from w2s_fast.decoding.step import Step
from w2s_fast.models import inference

# Steps whose draws stay on the device at once; of more, what was drawn is put away in between.
_STEPS = 64


class StepBucket(NamedTuple):
    """Bounds of the steps that one recording serves.

    Attributes:
        passes: of each model.
        plausible, dynamic: whether rows may ask for that; see :class:`Fusion`.
    """

    passes: tuple[Bucket, ...]
    plausible: bool = False
    dynamic: bool = False

    @property
    def rows(self) -> int:
        return self.passes[0].rows


class FirstBucket(NamedTuple):
    """Bounds of first steps: of their sources, and of the steps that follow."""

    sources: tuple[Bucket, ...]
    step: StepBucket


class DecodeGraphs:
    """Recorded steps of models that draw together. Within a chunk the host only says "again".

    Attributes:
        recorder: what else it records must not run at the same time.
    """

    def __init__(self, drawing: Drawing, recorder: Recorder, *, max_rows: int) -> None:
        """For up to ``max_rows`` rows, under the kernels' attention."""
        self.recorder = recorder
        self._drawing = drawing
        self._models = models = list(drawing.models)
        self._device = device = models[0].device
        self._max_rows = max_rows
        self._most_pages = [
            model.pool.max_tokens_per_slot // model.pool.page_size for model in models
        ]
        with torch.inference_mode():
            self._room = Room(device)
            # By rows. What is in them was drawn: spare rows, too, append what can be embedded.
            self._drawn: dict[int, Draws] = {}
        self.recordings: Recordings[StepBucket, Step]
        self.recordings = Recordings(models, recorder, self._prepare)
        self.firsts: Recordings[FirstBucket, FirstStep]
        self.firsts = Recordings(models, recorder, self._prepare_first)

    @inference
    def warm_up(self) -> None:
        """Record the smallest bucket for each number of rows, before any request waits for it."""
        # The largest first: the others find room in the memory that it left behind.
        for rows in reversed(rows_recorded(self._max_rows)):
            passes = (Bucket.smallest(rows, rows, 1, most) for most in self._most_pages)
            self.recordings.make(StepBucket(tuple(passes)))

    @inference
    def run(
        self,
        rows: Sequence[GrowingRows],
        sampling: SamplingColumns,
        fusion: FusionColumns | None,
        logits: Sequence[Tensor],
        steps: int,
    ) -> Draws | None:
        """What :meth:`Decoder.run` does, in one copy to the device, one draw, and replays.

        Args:
            rows: the same S in each model, with room for all tokens but the last.
            sampling, fusion: their settings.
            logits: of each model [S, V], from which the first tokens are drawn.
            steps: at least two.

        Returns:
            What each step drew; None if these rows have to run without: nothing has happened.
        """
        count = len(rows[0].slots)
        if count > self._max_rows or not self.recordings.usable:
            return None
        one = np.ones(count, np.int32)
        layouts = [
            lay_out(model.pool, own.slots, one, own.tree, ahead=steps - 2)
            for model, own in zip(self._models, rows)
        ]
        padded = round_up_rows(count, self._max_rows)
        passes = (
            Bucket.of(Bounds.of(layout), padded, padded, most)
            for layout, most in zip(layouts, self._most_pages)
        )
        bucket = StepBucket(
            tuple(passes),
            plausible=fusion is not None and fusion.some_plausible,
            dynamic=fusion is not None and fusion.some_dynamic,
        )
        recording = self.recordings.find(bucket)
        step = recording.static
        settings = {} if fusion is None else fusion._asdict()
        for m, (plan, layout, own) in enumerate(zip(step.plans, layouts, rows)):
            more = {**sampling._asdict(), **settings} if m == 0 else {}
            plan.load(layout, more, own.copies, back=True)
            plan.copy_pages(len(own.copies))
        first = None if step.fusion is None else step.fusion.first(count)
        drawn = self._drawing.draw_from(logits, step.sampling.first(count), first)
        step.drawn.part(1, count).put(0, *drawn)
        return self._replay(recording, count, steps)

    def begin(self, layout: DrawLayout, steps: int) -> Draws | None:
        """Run what rows come from, draw their first tokens, and ``steps`` - 1 more.

        In one copy to the device, and replays. All that is appended counts in the pools then.

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
        for model in self._models:
            model.check()
        layout.begin(steps, SPLIT_KEYS, SPLIT_QUERIES)
        padded = round_up_rows(rows, most)
        of_sources, of_rows = layout.buckets(
            SPLIT_RULE, padded, round_up_rows(layout.num_sources, most), most, self._most_pages
        )
        bucket = StepBucket(
            tuple(starmap(Bucket, of_rows)), layout.some_plausible, layout.some_dynamic
        )
        recording = self.recordings.find(bucket)
        first = self.firsts.find(FirstBucket(tuple(starmap(Bucket, of_sources)), bucket))
        step, before = recording.static, first.static
        for m, count in enumerate(layout.num_before):
            if count:
                self._models[m].pool.copy_pages(layout.before(m))
        host = before.passes.outbox.take()
        layout.write_rows(host.array, step.passes.rooms, step.passes.columns)
        layout.write_sources(host.array, before.passes.rooms, before.passes.columns, padded)
        before.passes.take(host)
        first.replay()
        for plan, count in zip(step.plans, layout.num_copies):
            plan.copy_unrecorded(count)
        return self._replay(recording, rows, steps)

    def _replay(self, recording: Recording[Step], rows: int, steps: int) -> Draws:
        """All steps but the first, whose tokens stand where steps draw; of so many rows.

        Of so many steps as are kept, what is returned stands where it was drawn: it is to be read
        or copied before these rows, or as many others, are drawn again.
        """
        drawn, put_away = recording.static.drawn, []
        for left in range(steps - 1, 0, -_STEPS):
            for _ in range(min(left, _STEPS)):
                recording.replay()
            if left > _STEPS:
                put_away.append(drawn.memory[:_STEPS].clone())
                # The last draw is the first of what follows.
                drawn.memory[0].copy_(drawn.memory[_STEPS])
                recording.static.taken.zero_()
        last = drawn.part(left + 1, rows)
        if not put_away:
            return last
        return Draws(torch.cat([*put_away, last.memory]), rows, drawn.room, drawn.models)

    def _prepare(self, bucket: StepBucket) -> Step:
        rows, others = bucket.rows, len(self._models) - 1
        sampling = sampling_fields(rows)
        fusion = fusion_fields(rows, len(self._drawing.guides)) if self._drawing.guides else {}
        settings = {**sampling, "taken": Field(torch.int64, (1,)), **fusion}
        passes = StaticPasses.cut(
            self._models,
            bucket.passes,
            [settings, *({} for _ in range(others))],
            # In the order of RowColumn (csrc/draw.h).
            [[*sampling, "taken", "copies", *fusion], *(["copies"] for _ in range(others))],
            self._room,
        )
        if rows not in self._drawn:
            self._drawn[rows] = Draws.empty(_STEPS + 1, rows, self._device, others)
            self._drawn[rows].memory.zero_()
        more = passes.plans[0].more
        fuse = None
        if fusion:
            fuse = Fusion(
                more["beta"],
                more["plausibility"],
                more["dynamic"],
                some_plausible=bucket.plausible,
                some_dynamic=bucket.dynamic,
            )
        return Step(
            drawing=self._drawing,
            passes=passes,
            sampling=SamplingBatch(*(more[name] for name in sampling)),
            fusion=fuse,
            taken=more["taken"],
            drawn=self._drawn[rows],
        )

    def _prepare_first(self, bucket: FirstBucket) -> FirstStep:
        int64 = torch.int64
        more = [
            {"tokens": Field(int64, (own.tokens,)), "last": Field(int64, (own.rows,))}
            for own in bucket.sources
        ]
        more[0]["source"] = Field(int64, (bucket.step.rows,))
        step = self.recordings.static_of(bucket.step)
        passes = StaticPasses.cut(
            self._models,
            bucket.sources,
            more,
            [list(own) for own in more],
            self._room,
            behind=step.passes,
        )
        return FirstStep(
            step=step,
            passes=passes,
            tokens=[plan.more["tokens"] for plan in passes.plans],
            last=[plan.more["last"] for plan in passes.plans],
            source=passes.plans[0].more["source"],
        )
