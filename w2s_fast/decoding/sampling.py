"""The sampling settings of many rows, as tensors: made once a step, for one copy to the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from w2s_fast.attention import Field, Fields, host_buffer
from w2s_fast.decoding.draws import Draw
from w2s_fast.kernels.noise import seed_bits
from w2s_fast.kernels.sample_tokens import sample_tokens
from w2s_fast.params import SearchParams


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
        """The settings of S rows, on the host: they travel with what is run for them.

        Args:
            params: of the request that each row belongs to.
            candidates: each row's index among the candidates of its request.
            positions: how many tokens each row's response has.
            device: where they will go.
        """
        different = list({id(own): own for own in params}.values())
        index = {id(own): i for i, own in enumerate(different)}
        which = np.array([index[id(own)] for own in params], np.int64)
        settings = {
            "temperature": [p.temperature for p in different],
            "top_k": [p.top_k for p in different],
            "top_p": [p.top_p for p in different],
            "min_p": [p.min_p for p in different],
            "seed": [seed_bits(p.seed) for p in different],
        }
        values = {name: np.array(column)[which] for name, column in settings.items()}
        values |= {"candidate": np.asarray(candidates), "position": np.asarray(positions)}
        fields = Fields(sampling_fields(len(params)))
        buffer = host_buffer(fields.nbytes, device)
        fields.fill(buffer.numpy(), values)
        return cls(**fields.tensors(buffer))

    def to(self, device: torch.device) -> SamplingBatch:
        """The same on a device, in one copy; moved on there, it stays what it was here."""
        fields = Fields(sampling_fields(len(self.position)))
        here = host_buffer(fields.nbytes, device)
        fields.fill(here.numpy(), self.arrays())
        return SamplingBatch(**fields.tensors(here.to(device, non_blocking=True)))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The settings of rows on the host, by name."""
        return {name: column.numpy() for name, column in vars(self).items()}

    def first(self, rows: int) -> SamplingBatch:
        """The first rows: views."""
        return SamplingBatch(*(column[:rows] for column in vars(self).values()))

    def draw(self, logits: Tensor) -> Draw:
        """Sample from logits [S, V], for the positions that :meth:`advance` has come to."""
        return Draw(*sample_tokens(logits, *vars(self).values()))

    def advance(self) -> None:
        """Move on by one token, in place."""
        self.position.add_(1)
