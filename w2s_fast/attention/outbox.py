"""Outbox: memory of the host for copies of one size, filled anew as soon as they were made."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from w2s_fast.attention.staging import host_buffer


class Mark(Protocol):
    """A place among what a device is to do, as an event of CUDA is one."""

    def record(self) -> None:
        """It stands behind all that the current stream has been given so far."""

    def query(self) -> bool:
        """Whether the device has come there."""
        ...


@dataclass
class Sheet:
    """Memory to be filled, and copied from.

    Attributes:
        tensor: uint8 [n]. array: the same.
        copied: behind the last copies from it; None: a copy is made when it is launched.
    """

    tensor: Tensor
    array: NDArray[np.uint8]
    copied: Mark | None


class Outbox:
    """Sheets of one size: to ask torch for memory would take longer than to fill it.

    Who is interrupted between the two calls takes a sheet along; torch looks after its memory.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        """``device``: where copies go."""
        self._nbytes = nbytes
        self._device = device
        self._sent: deque[Sheet] = deque()  # in the order in which they are copied

    def take(self) -> Sheet:
        """A sheet that nothing is still to be copied from."""
        if self._sent and ((copied := self._sent[0].copied) is None or copied.query()):
            return self._sent.popleft()
        tensor = host_buffer(self._nbytes, self._device)
        return Sheet(tensor, tensor.numpy(), mark_on(self._device))

    def send(self, sheet: Sheet) -> None:
        """All copies from a sheet have been launched: it is taken again when they are made."""
        if sheet.copied is not None:
            sheet.copied.record()
        self._sent.append(sheet)


def mark_on(device: torch.device) -> Mark | None:
    """A mark of a device that is told what to do before it does it."""
    return torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
