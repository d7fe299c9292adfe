"""Outbox: memory of the host for copies of one size, filled anew as soon as they were made."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from w2s_fast.attention.staging import host_buffer


@dataclass
class Sheet:
    """Memory to be filled, and copied from.

    Attributes:
        tensor: uint8 [n]. array: the same.
    """

    tensor: Tensor
    array: NDArray[np.uint8]
    _copied: torch.cuda.Event | None

    @property
    def free(self) -> bool:
        """Whether all that was launched from it has been made."""
        return self._copied is None or self._copied.query()

    def sent(self) -> None:
        """All copies from it that the current stream is to make have been launched."""
        if self._copied is not None:
            self._copied.record()


class Outbox:
    """Sheets of one size. To ask torch for memory would take longer than to fill it.

    Who is interrupted between the two calls takes a sheet along; torch looks after its memory.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        """``device``: where copies go."""
        self._nbytes = nbytes
        self._device = device
        self._sent: deque[Sheet] = deque()  # in the order in which their copies are made

    def take(self) -> Sheet:
        """A sheet whose copies have been made."""
        if self._sent and self._sent[0].free:
            return self._sent.popleft()
        tensor = host_buffer(self._nbytes, self._device)
        copied = torch.cuda.Event() if self._device.type == "cuda" else None  # type: ignore[no-untyped-call]
        return Sheet(tensor, tensor.numpy(), copied)

    def send(self, sheet: Sheet) -> None:
        """Let a sheet be taken again, once what was launched from it has been made."""
        sheet.sent()
        self._sent.append(sheet)
