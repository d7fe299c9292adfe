"""The sampling settings of many rows, as tensors: made once a step, on the device."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from w2s_fast.kernels.sample_tokens import sample_tokens

# Of the settings, in their order.
_DTYPES = (
    *(torch.float32, torch.int64, torch.float64, torch.float64),
    *(torch.int64, torch.int64, torch.int64),
)


class Draw(NamedTuple):
    """Tokens int64 [S], and their unwarped log-probs float32 [S], NaN for broken logits."""

    tokens: Tensor
    logprobs: Tensor


class SamplingColumns(NamedTuple):
    """The columns of a :class:`SamplingBatch` on the host, in its order and dtypes."""

    temperature: NDArray[np.float32]
    top_k: NDArray[np.int64]
    top_p: NDArray[np.float64]
    min_p: NDArray[np.float64]
    seed: NDArray[np.int64]
    candidate: NDArray[np.int64]
    position: NDArray[np.int64]


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

    @classmethod
    def of(cls, columns: SamplingColumns, device: torch.device) -> SamplingBatch:
        """The settings of S rows, on their device."""
        return cls(
            *(
                torch.from_numpy(column).to(device, dtype, non_blocking=True)
                for column, dtype in zip(columns, _DTYPES, strict=True)
            )
        )

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> SamplingBatch:
        """Room for the settings of ``rows`` rows."""
        return cls(*(torch.zeros(rows, dtype=dtype, device=device) for dtype in _DTYPES))

    @property
    def columns(self) -> list[Tensor]:
        """All tensors, in the order of the attributes."""
        return [getattr(self, column.name) for column in fields(self)]

    def first(self, rows: int) -> SamplingBatch:
        """The first rows: views."""
        return SamplingBatch(*(column[:rows] for column in self.columns))

    def draw(self, logits: Tensor) -> Draw:
        """Sample from logits [S, V], for the positions that :meth:`advance` has come to."""
        return Draw(*sample_tokens(logits, *self.columns))

    def advance(self) -> None:
        """Move on by one token, in place."""
        self.position.add_(1)
