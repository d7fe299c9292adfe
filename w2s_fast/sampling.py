"""The sampling settings of many rows, as tensors: made once a step, on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from w2s_fast.kernels.noise import seed_bits
from w2s_fast.kernels.sample_tokens import sample_tokens
from w2s_fast.request import Beam, Request


@dataclass(frozen=True)
class SamplingBatch:
    """Settings and noise keys of S rows, each a tensor of shape [S].

    ``position`` is that of the first token to be drawn; the others are as in
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
    def of(cls, rows: Sequence[tuple[Request, Beam]], device: torch.device) -> SamplingBatch:
        """The settings of candidates and the requests they belong to."""

        def column(values: list[float] | list[int], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        params = [request.params for request, _ in rows]
        return cls(
            temperature=column([p.temperature for p in params], torch.float32),
            top_k=column([p.top_k for p in params], torch.int64),
            top_p=column([p.top_p for p in params], torch.float64),
            min_p=column([p.min_p for p in params], torch.float64),
            seed=column([seed_bits(p.seed) for p in params], torch.int64),
            candidate=column([beam.index for _, beam in rows], torch.int64),
            position=column([len(beam.tokens) for _, beam in rows], torch.int64),
        )

    def draw(self, logits: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Sample from logits [S, V] for position ``self.position + step``.

        Returns tokens int64 [S] and their unwarped log-probs float32 [S], NaN for broken logits.
        """
        return sample_tokens(
            logits,
            self.temperature,
            self.top_k,
            self.top_p,
            self.min_p,
            self.seed,
            self.candidate,
            self.position + step,
        )
