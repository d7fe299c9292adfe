"""The sampling settings of many rows, as tensors: made once a step, for one copy to the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from w2s_fast.attention import Field, to_device
from w2s_fast.decoding.draws import Draw
from w2s_fast.kernels.sample_tokens import sample_tokens


def sampling_fields(rows: int) -> dict[str, Field]:
    """The settings of ``rows`` rows as fields of a buffer, in the order of sample_tokens.

    A spare row takes the most likely token: settings have to be allowed ones.
    """
    return {
        "temperature": Field(torch.float32, (rows,)),
        "top_k": Field(torch.int64, (rows,)),
        "top_p": Field(torch.float64, (rows,), spare=1.0),
        "min_p": Field(torch.float64, (rows,)),
        "seed": Field(torch.int64, (rows,)),
        "candidate": Field(torch.int64, (rows,)),
        "position": Field(torch.int64, (rows,)),
    }


class SamplingColumns(NamedTuple):
    """The columns of a :class:`SamplingBatch` on the host, where they are made.

    They travel with what is run for their rows, or by themselves.
    """

    temperature: NDArray[np.float32]
    top_k: NDArray[np.int64]
    top_p: NDArray[np.float64]
    min_p: NDArray[np.float64]
    seed: NDArray[np.int64]
    candidate: NDArray[np.int64]
    position: NDArray[np.int64]

    def to(self, device: torch.device) -> SamplingBatch:
        """On a device, in one copy; moved on there, they stay here what they were."""
        return SamplingBatch(**to_device(self._asdict(), device))


@dataclass(frozen=True)
class SamplingBatch:
    """Settings and noise keys of S rows, each a tensor of shape [S].

    ``position`` is that of the next token to be drawn; the others are as in
    :func:`w2s_fast.kernels.sample_tokens.sample_tokens`.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor
    candidate: Tensor
    position: Tensor

    def first(self, rows: int) -> SamplingBatch:
        """The first rows: views."""
        return SamplingBatch(*(column[:rows] for column in vars(self).values()))

    def draw(self, logits: Tensor) -> Draw:
        """Sample from logits [S, V], for the positions that :meth:`advance` has come to."""
        return Draw(*sample_tokens(logits, *vars(self).values()))

    def advance(self) -> None:
        """Move on by one token, in place."""
        self.position.add_(1)
