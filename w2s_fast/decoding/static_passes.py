"""StaticPasses: the passes of several models at fixed addresses, filled by one copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from w2s_fast._pages import PassRoom
from w2s_fast.attention import Bucket, Field, Outbox, Room, Sheet, StaticPlan, launch_copy
from w2s_fast.models import PagedModel


@dataclass
class StaticPasses:
    """A plan for each model, side by side in one buffer, which may lie behind that of others.

    Attributes:
        plans: of each model, with what was asked for beside it.
        buffer: uint8 [n]. others: what lies before it.
        nbytes: of both, as the host lays them out. outbox: where it does.
        rooms: where each plan lies in what the host lays out. columns: offsets of what lies
            beside it.
    """

    plans: Sequence[StaticPlan]
    buffer: Tensor
    others: Tensor | None
    nbytes: int
    outbox: Outbox
    rooms: list[PassRoom]
    columns: list[NDArray[np.int64]]
    _whole: Tensor | None

    @classmethod
    def cut(
        cls,
        models: Sequence[PagedModel],
        buckets: Sequence[Bucket],
        more: Sequence[Mapping[str, Field]],
        names: Sequence[Sequence[str]],
        room: Room,
        behind: StaticPasses | None = None,
    ) -> StaticPasses:
        """In the same memory as all others of the room.

        Args:
            more: fields of each model beside its plan. names: whose offsets ``columns`` has.
            behind: passes of the room that are loaded together with these.
        """
        made = [StaticPlan.fields_of(bucket, own) for bucket, own in zip(buckets, more)]
        begin = 0 if behind is None else behind.nbytes
        ends = np.cumsum([begin, *(own.fields.nbytes for own in made)]).tolist()
        whole = room.take(ends[-1])
        spans = [slice(begin, end) for begin, end in pairwise(ends)]
        others = None if behind is None else behind.buffer
        together = others is None or others.data_ptr() == whole.data_ptr()
        return cls(
            plans=[
                StaticPlan.over(bucket, model.pool, own, whole[span])
                for model, bucket, own, span in zip(models, buckets, made, spans)
            ],
            buffer=whole[begin:],
            others=others,
            nbytes=ends[-1],
            outbox=Outbox(ends[-1], whole.device),
            rooms=[own.room_at(span.start) for own, span in zip(made, spans)],
            columns=[
                own.fields.offsets_of(wanted) + span.start
                for own, wanted, span in zip(made, names, spans)
            ],
            _whole=whole if together else None,
        )

    def clear(self) -> None:
        """No row is left in any of them, and no token."""
        for plan in self.plans:
            plan.clear()

    def take(self, host: Sheet) -> None:
        """Take over what the host has laid out: in one copy, if the room has not grown between."""
        if self._whole is not None:
            launch_copy(host.tensor, self._whole)
        else:
            assert self.others is not None
            launch_copy(host.tensor[: len(self.others)], self.others)
            launch_copy(host.tensor[len(self.others) :], self.buffer)
        self.outbox.send(host)
