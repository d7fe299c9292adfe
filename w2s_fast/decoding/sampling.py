"""The sampling settings of many rows, as tensors: made once a step, on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from w2s_fast.kernels.noise import seed_bits
from w2s_fast.kernels.sample_tokens import sample_tokens
from w2s_fast.params import SearchParams

# Of the settings, in their order.
_DTYPES = (
    *(torch.float32, torch.int64, torch.float64, torch.float64),
    *(torch.int64, torch.int64, torch.int64),
)


class Draw(NamedTuple):
    """Tokens int64 [S], and their unwarped log-probs float32 [S], NaN for broken logits."""

    tokens: Tensor
    logprobs: Tensor


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
    def of(
        cls,
        params: Sequence[SearchParams],
        candidates: Sequence[int],
        positions: Sequence[int],
        device: torch.device,
    ) -> SamplingBatch:
        """The settings of S rows.

        Args:
            params: of the request that each row belongs to.
            candidates: each row's index among the candidates of its request.
            positions: how many tokens each row's response has.
        """
        values: list[Sequence[Any]] = [
            [p.temperature for p in params],
            [p.top_k for p in params],
            [p.top_p for p in params],
            [p.min_p for p in params],
            [seed_bits(p.seed) for p in params],
            candidates,
            positions,
        ]
        return cls(
            *(
                torch.tensor(column, dtype=dtype, device=device)
                for column, dtype in zip(values, _DTYPES, strict=True)
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
