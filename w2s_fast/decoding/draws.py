"""Draws: what several steps drew for the same rows, in one piece of memory, for one read."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from w2s_fast.attention import Field, Fields


class Draw(NamedTuple):
    """Tokens int64 [S], and their unwarped log-probs float32 [S], NaN for broken logits."""

    tokens: Tensor
    logprobs: Tensor


class Draws:
    """What N steps drew for S rows.

    Attributes:
        memory: uint8 [N, n], a step after the other; the others are views of it.
        tokens: int64 [N, S]. logprobs: float32 [N, S], NaN for broken logits.
        rows: S. room: rows that there is memory for.
        logprobs_at: where log-probs begin in the bytes of a step, behind the tokens.
    """

    def __init__(self, memory: Tensor, rows: int, room: int | None = None) -> None:
        """``memory`` of :meth:`bytes_a_step` of ``room`` rows, of which the first are wanted."""
        self.memory = memory
        self.rows = rows
        self.room = rows if room is None else room
        self._fields = _fields(self.room)
        self.logprobs_at = self._fields.offsets["logprobs"]

    @functools.cached_property
    def tokens(self) -> Tensor:
        return self._column("tokens", torch.int64)

    @functools.cached_property
    def logprobs(self) -> Tensor:
        return self._column("logprobs", torch.float32)

    def _column(self, name: str, dtype: torch.dtype) -> Tensor:
        begin = self.memory.storage_offset() + self._fields.offsets[name]
        strides = (self._fields.nbytes // dtype.itemsize, 1)
        shape = (len(self.memory), self.rows)
        return self.memory.view(dtype).as_strided(shape, strides, begin // dtype.itemsize)

    @classmethod
    def empty(cls, steps: int, rows: int, device: torch.device) -> Draws:
        """Room for so many."""
        size = cls.bytes_a_step(rows)
        return cls(torch.empty(steps, size, dtype=torch.uint8, device=device), rows)

    @staticmethod
    def bytes_a_step(rows: int) -> int:
        return _fields(rows).nbytes

    def __len__(self) -> int:
        return len(self.memory)

    def __getitem__(self, step: int) -> Draw:
        return Draw(self.tokens[step], self.logprobs[step])

    def put(self, step: int, draw: Draw) -> None:
        """Keep what a step drew."""
        for ours, theirs in zip(self[step], draw):
            ours.copy_(theirs)


@functools.lru_cache(maxsize=256)
def _fields(rows: int) -> Fields:
    return Fields(
        {"tokens": Field(torch.int64, (rows,)), "logprobs": Field(torch.float32, (rows,))}
    )
