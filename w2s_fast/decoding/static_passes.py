"""StaticPasses: the passes of several models at fixed addresses, filled by one copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from w2s_fast._pages import PassRoom
from w2s_fast.attention import Bucket, Field, Room, StaticPlan, host_buffer, launch_copy
from w2s_fast.models import PagedModel


@dataclass
class StaticPasses:
    """A plan for each model, side by side in one buffer.

    Attributes:
        plans: of each model, with what was asked for beside it.
        buffer: uint8 [nbytes].
        rooms: where each plan lies in the buffer. columns: offsets of what lies beside it.
    """

    plans: Sequence[StaticPlan]
    buffer: Tensor
    nbytes: int
    rooms: list[PassRoom]
    columns: list[NDArray[np.int64]]

    @classmethod
    def cut(
        cls,
        models: Sequence[PagedModel],
        buckets: Sequence[Bucket],
        more: Sequence[Mapping[str, Field]],
        names: Sequence[Sequence[str]],
        room: Room,
    ) -> StaticPasses:
        """In the same memory as all others of the room.

        Args:
            more: fields of each model beside its plan. names: whose offsets ``columns`` has.
        """
        made = [StaticPlan.fields_of(bucket, own) for bucket, own in zip(buckets, more)]
        ends = np.cumsum([0, *(own.fields.nbytes for own in made)]).tolist()
        buffer = room.take(ends[-1])
        spans = [slice(begin, end) for begin, end in pairwise(ends)]
        return cls(
            plans=[
                StaticPlan.over(bucket, model.pool, own, buffer[span])
                for model, bucket, own, span in zip(models, buckets, made, spans)
            ],
            buffer=buffer,
            nbytes=ends[-1],
            rooms=[own.room_at(span.start) for own, span in zip(made, spans)],
            columns=[
                own.fields.offsets_of(wanted) + span.start
                for own, wanted, span in zip(made, names, spans)
            ],
        )

    def clear(self) -> None:
        """No row is left in any of them, and no token."""
        for plan in self.plans:
            plan.clear()

    def host_buffer(self) -> Tensor:
        """Memory of the host to be filled for :meth:`take`."""
        return host_buffer(self.nbytes, self.buffer.device)

    def take(self, host: Tensor) -> None:
        """Take over what the host has laid out, in one copy."""
        launch_copy(host, self.buffer)
