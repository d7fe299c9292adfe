"""Recorded selections: the guides' bodies, their log-probs and score_select as one recording."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, starmap
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from w2s_fast._pages import PassRoom, ScoringLayout, round_up_tokens
from w2s_fast.attention import (
    SPLIT_KEYS,
    SPLIT_QUERIES,
    SPLIT_RULE,
    Bucket,
    Field,
    Fields,
    Outbox,
    Room,
    StaticPlan,
    launch_copy,
)
from w2s_fast.cache import Int32Array
from w2s_fast.decoding import (
    MOST_NEW,
    Draws,
    Lane,
    PassGraphs,
    Recorder,
    Recordings,
    most_pass_tokens,
    round_up_rows,
)
from w2s_fast.kernels.linear_logprob_partials import Partials
from w2s_fast.kernels.score_select import packed_words, score_select
from w2s_fast.kernels.select_beams import MAX_CANDIDATES
from w2s_fast.models import Groups, PagedModel, run_body
from w2s_fast.search.guide import (
    GuidePartials,
    PagedGuide,
    partials_of,
    roles_of,
    two_at_a_time,
)
from w2s_fast.search.selection import Selection

# Ids that end a response, of a round, for which there is room in the smallest bucket.
_STOPS = 4


class _Sizes(NamedTuple):
    """Bounds of what is selected among.

    Attributes:
        rounds, candidates, tokens, stops, max_candidates, max_width: of score_select.
        known: tokens that the host has.
    """

    rounds: int
    candidates: int
    tokens: int
    stops: int
    known: int
    max_candidates: int
    max_width: int


class _Bucket(NamedTuple):
    """Bounds of the selections that one recording serves.

    Attributes:
        passes: of each model.
        steps, rows: of the tokens that the host has not.
    """

    passes: tuple[Bucket, ...]
    sizes: _Sizes
    steps: int
    rows: int


@dataclass
class _Scoring:
    """A selection of one bucket.

    Attributes:
        bucket: its own. scorer: whose models run.
        plans: of each model, within ``buffer`` uint8 [n]. outbox: where the host lays it out.
        columns: what travels beside them, by name.
        drawn: tokens as they were drawn. packed: what comes out, int64 [n].
        offsets, items: of the columns. rooms: where the plans lie. of_copies: where each has the
            pages to be copied.
    """

    bucket: _Bucket
    scorer: ScoreGraphs
    buffer: Tensor
    outbox: Outbox
    plans: list[StaticPlan]
    columns: dict[str, Tensor]
    drawn: Draws
    packed: Tensor
    offsets: NDArray[np.int64]
    items: NDArray[np.int64]
    rooms: list[PassRoom]
    of_copies: list[int]

    def clear(self) -> None:
        self.buffer.zero_()
        self.drawn.memory.zero_()
        for plan in self.plans:
            plan.clear()

    def run(self) -> None:
        columns = dict(self.columns)
        known, logprobs = columns.pop("tokens"), columns.pop("logprobs")
        tokens = torch.cat([self.drawn.tokens.flatten(), known])
        logprobs = torch.cat([self.drawn.logprobs.flatten(), logprobs])
        targets = columns.pop("targets")
        new = tokens.index_select(0, targets)
        inputs = [columns.pop(f"inputs{m}") for m in range(len(self.plans))]

        chunks = [tokens.index_select(0, own) for own in inputs]
        own = logprobs.index_select(0, targets)
        packed = score_select(
            self.scorer.run_models(self.plans, chunks, new, own),
            tokens=new,
            logprobs=own,
            **columns,
            max_candidates=self.bucket.sizes.max_candidates,
            max_width=self.bucket.sizes.max_width,
        )
        self.packed.copy_(packed)


class ScoreGraphs:
    """Recorded selections of an engine's guides, over all of their models at once."""

    def __init__(
        self,
        guides: Sequence[PagedGuide],
        models: Sequence[PagedModel],
        recorder: Recorder,
        *,
        max_rows: int,
        vocab_size: int,
    ) -> None:
        """For up to ``max_rows`` candidates, and as many tokens as one pass of each model may have.

        Args:
            models: of the search, the base first, and at least one other.
            recorder: of a device that nothing else it recorded runs on at the same time.
            vocab_size: ids from here on are padding.
        """
        self._guides = list(guides)
        self._roles = roles_of(guides, models)
        self._models = list(models[1:])
        self._vocab_size = vocab_size
        self._lane = Lane(models[0].device)
        self._groups = Groups(self._models)
        self._managers = [model.pool.manager for model in self._models]
        self._most_pages = [
            model.pool.max_tokens_per_slot // model.pool.page_size for model in self._models
        ]
        self._max_rows = max_rows
        self._max_tokens = min(
            [most_pass_tokens(max_rows), *(model.max_pass_tokens for model in self._models)]
        )
        self._device = device = self._models[0].device
        with torch.inference_mode():
            self._room, self._drawn, self._packed = Room(device), Room(device), Room(device)
        self.recordings: Recordings[_Bucket, _Scoring]
        self.recordings = Recordings(self._models, recorder, self._prepare)

    def run(
        self, layout: ScoringLayout, drawn: Draws | None, copies: Sequence[Int32Array]
    ) -> Selection | None:
        """Score and select what is laid out, in one copy to the device and one replay.

        Args:
            drawn: tokens that the host does not know yet. copies: of each model, pages to be copied
                before.

        Returns:
            None if it has to be done without: nothing has happened.
        """
        rows, sizes = layout.num_rows, layout.sizes
        _, candidates, tokens, *_, max_candidates, _ = sizes
        if (
            not self.recordings.usable
            or rows == 0
            or candidates > self._max_rows
            or tokens > self._max_tokens
            or max_candidates > MAX_CANDIDATES  # which torch selects, and asks the host
            or layout.max_new > MOST_NEW
        ):
            return None
        for model in self._models:
            model.check()
        more = layout.begin(self._managers, SPLIT_KEYS, SPLIT_QUERIES)
        rounded = _rounded(sizes, self._max_rows, self._max_tokens)
        passes = layout.buckets(
            SPLIT_RULE, round_up_rows(rows, self._max_rows), rounded.tokens, self._most_pages
        )
        bucket = _Bucket(
            tuple(starmap(Bucket, passes)),
            rounded,
            steps=0 if drawn is None else len(drawn),
            rows=0 if drawn is None else drawn.room,
        )
        recording = self.recordings.find(bucket)
        static = recording.static
        host = static.outbox.take()
        layout.write(
            host.array,
            static.offsets,
            static.items,
            bucket.rows,
            static.rooms,
            copies,
            static.of_copies,
        )
        launch_copy(host.tensor, static.buffer)
        static.outbox.send(host)
        for model, plan, pairs, others in zip(self._models, static.plans, copies, more):
            plan.copy_unrecorded(len(pairs))
            if len(others):
                model.pool.copy_pages(others)
        if drawn is not None:
            launch_copy(drawn.memory, static.drawn.memory)
        recording.replay()
        shape = (rounded.rounds, rounded.candidates, rounded.tokens, rounded.max_width)
        return Selection(static.packed, shape, layout.cu_tokens, None)

    def run_models(
        self, plans: Sequence[StaticPlan], chunks: Sequence[Tensor], new: Tensor, logprobs: Tensor
    ) -> list[GuidePartials]:
        """What the guides' models leave of the log-probs of ``new`` int64 [T].

        Args:
            plans: of each model. chunks: what each model runs.
            logprobs: float32 [T], the base's.
        """

        def run(g: int) -> list[Partials]:
            members, together = self._groups.members[g], self._groups.together[g]
            for m in members:
                plans[m].copy_recorded()
            if together is not None and len(members) * len(new) <= together.most_tokens:
                own = [plans[m].plan for m in members]
                hidden = together.run([chunks[m] for m in members], own)
            else:
                hidden = [alone(m) for m in members]
            return [
                self._models[m].token_partials(own, new, self._vocab_size)
                for m, own in zip(members, hidden)
            ]

        def alone(m: int) -> Tensor:
            model, plan = self._models[m], plans[m].plan
            body = model.replays.body if isinstance(model.replays, PassGraphs) else None
            return run_body(model.view, chunks[m], plan.positions, plan, body)

        found = two_at_a_time(self._lane, len(self._groups.members), run)
        return partials_of(self._roles, self._groups.in_order(found), logprobs)

    def join(self) -> None:
        """What runs from now on comes after all that was launched, also where that was cut off."""
        self._lane.join()

    def _prepare(self, bucket: _Bucket) -> _Scoring:
        int64, float64 = torch.int64, torch.float64
        sizes = bucket.sizes
        columns = {
            "tokens": Field(int64, (sizes.known,)),
            "logprobs": Field(torch.float32, (sizes.known,)),
            "targets": Field(int64, (sizes.tokens,)),
            **{f"inputs{m}": Field(int64, (sizes.tokens,)) for m in range(len(self._models))},
            "weights": Field(float64, (len(self._guides),)),
            "cu_tokens": Field(int64, (sizes.candidates + 1,)),
            "previous": Field(float64, (sizes.candidates,)),
            "lengths": Field(int64, (sizes.candidates,)),
            "parents": Field(torch.int32, (sizes.candidates,)),
            "siblings": Field(int64, (sizes.candidates,)),
            "cu_candidates": Field(int64, (sizes.rounds + 1,)),
            "stops": Field(int64, (sizes.stops,)),
            "cu_stops": Field(int64, (sizes.rounds + 1,)),
            "width": Field(int64, (sizes.rounds,)),
            "mean": Field(torch.bool, (sizes.rounds,)),
            "dedup": Field(torch.bool, (sizes.rounds,)),
        }
        fields = Fields(columns)
        made = [StaticPlan.fields_of(own) for own in bucket.passes]
        ends = np.cumsum([fields.nbytes, *(own.fields.nbytes for own in made)]).tolist()
        spans = [slice(begin, end) for begin, end in pairwise(ends)]
        buffer = self._room.take(ends[-1])
        plans = [
            StaticPlan.over(own, model.pool, parts, buffer[span])
            for own, model, parts, span in zip(bucket.passes, self._models, made, spans)
        ]
        words = packed_words(sizes.rounds, sizes.candidates, sizes.tokens, sizes.max_width)
        a_step = Draws.bytes_a_step(bucket.rows)
        memory = self._drawn.take(bucket.steps * a_step).view(bucket.steps, a_step)
        return _Scoring(
            bucket=bucket,
            scorer=self,
            buffer=buffer,
            outbox=Outbox(ends[-1], self._device),
            plans=plans,
            columns=fields.tensors(buffer),
            drawn=Draws(memory, bucket.rows),
            packed=self._packed.take(8 * words).view(int64),
            offsets=fields.offsets_of(columns),
            items=np.array([field.shape[0] for field in columns.values()], np.int64),
            rooms=[own.room_at(span.start) for own, span in zip(made, spans)],
            of_copies=[own.fields.offsets["copies"] + span.start for own, span in zip(made, spans)],
        )


@functools.lru_cache(maxsize=1024)  # most rounds are of the sizes of the one before
def _rounded(sizes: tuple[int, ...], max_rows: int, max_tokens: int) -> _Sizes:
    """Sizes of a layout, rounded up to those that are recorded."""
    found = _Sizes(*sizes)
    return _Sizes(
        rounds=_power(found.rounds),
        candidates=round_up_rows(found.candidates, max_rows),
        tokens=min(round_up_tokens(found.tokens), max_tokens),
        stops=_power(max(found.stops, _STOPS * found.rounds)),
        known=_power(found.known),
        max_candidates=_power(found.max_candidates),
        max_width=_power(found.max_width),
    )


def _power(count: int) -> int:
    """The next power of two."""
    return 1 << max(0, count - 1).bit_length()
