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
        models: how many other models' log-probs of the same tokens stand behind.
        logprobs_at: where log-probs begin in the bytes of a step, behind the tokens.
        others_at: where those of other models begin, each with ``room`` rows.
    """

    def __init__(self, memory: Tensor, rows: int, room: int | None = None, models: int = 0) -> None:
        """``memory`` of :meth:`bytes_a_step` of ``room`` rows, of which the first are wanted."""
        self.memory = memory
        self.rows = rows
        self.room = rows if room is None else room
        self.models = models
        self._steps = len(memory)
        self._part: Draws | None = None
        self._fields = _fields(self.room, models)
        self.logprobs_at = self._fields.offsets["logprobs"]
        self.others_at = self._fields.offsets["others"]

    @functools.cached_property
    def tokens(self) -> Tensor:
        return self._column("tokens", torch.int64, (self.rows,), (1,))

    @functools.cached_property
    def logprobs(self) -> Tensor:
        return self._column("logprobs", torch.float32, (self.rows,), (1,))

    @functools.cached_property
    def others(self) -> Tensor:
        """float32 [N, models, S]."""
        return self._column("others", torch.float32, (self.models, self.rows), (self.room, 1))

    def _column(
        self, name: str, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...]
    ) -> Tensor:
        """Of every step a field of this shape."""
        shape = (len(self.memory), *shape)
        if not self.memory.numel():
            return self.memory.new_empty(shape, dtype=dtype)
        begin = self.memory.storage_offset() + self._fields.offsets[name]
        strides = (self._fields.nbytes // dtype.itemsize, *strides)
        return self.memory.view(dtype).as_strided(shape, strides, begin // dtype.itemsize)

    @classmethod
    def empty(cls, steps: int, rows: int, device: torch.device, models: int = 0) -> Draws:
        """Room for so many."""
        size = cls.bytes_a_step(rows, models)
        memory = torch.empty(steps, size, dtype=torch.uint8, device=device)
        return cls(memory, rows, models=models)

    @staticmethod
    def bytes_a_step(rows: int, models: int = 0) -> int:
        return _fields(rows, models).nbytes

    def __len__(self) -> int:
        return self._steps

    def part(self, steps: int, rows: int) -> Draws:
        """The first of both: a view. The last one is kept, since most rounds ask for the same."""
        part = self._part
        if part is None or len(part) != steps or part.rows != rows:
            part = self._part = Draws(self.memory[:steps], rows, self.room, self.models)
        return part

    def __getitem__(self, step: int) -> Draw:
        return Draw(self.tokens[step], self.logprobs[step])

    def put(self, step: int, draw: Draw, others: Tensor | None = None) -> None:
        """Keep what a step drew, and what other models say of it, float32 [models, S]."""
        for ours, theirs in zip(self[step], draw):
            ours.copy_(theirs)
        if others is not None:
            self.others[step].copy_(others)


@functools.lru_cache(maxsize=256)
def _fields(rows: int, models: int) -> Fields:
    return Fields(
        {
            "tokens": Field(torch.int64, (rows,)),
            "logprobs": Field(torch.float32, (rows,)),
            "others": Field(torch.float32, (models, rows)),
        }
    )
