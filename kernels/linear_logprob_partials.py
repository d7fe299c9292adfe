"""The first half of linear_logprob: what its programs leave of each row, before it is merged.

Who merges them anyway, as score_select does, saves the launch in between.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from w2s_fast.kernels.library import register, runs_triton
from w2s_fast.kernels.linear_logprob import (
    check_shapes,
    empty_partials,
    is_fused,
    linear_logprob,
    split_vocabulary,
)
from w2s_fast.kernels.logsumexp import merge_splits


class Partials(NamedTuple):
    """N log-probs as S splits of the vocabulary have left them.

        log p_n = target_n - M_n - log sum_i total_ni * exp(largest_ni - M_n),  M_n = max largest_n

    Attributes:
        largest: float32 [N, S], contiguous: the largest logit of each split; finite.
        total: float32 [N, S], contiguous: sum of exp(logit - largest) over the split.
        target: float32 [N], the token's own logit; NaN where the token is no id.
    """

    largest: Tensor
    total: Tensor
    target: Tensor

    @classmethod
    def of_logprobs(cls, logprobs: Tensor) -> Partials:
        """Finished log-probs, float32 [N], as one split each: merged, they are the same bits."""
        largest = torch.zeros_like(logprobs)[:, None]
        return cls(largest, torch.ones_like(largest), logprobs)

    def logprobs(self) -> Tensor:
        """Merge them: float32 [N], in nats."""
        if runs_triton(self.target.device):
            return merge_splits(*self)
        top = self.largest.amax(1, keepdim=True)
        total = (self.total * (self.largest - top).exp()).sum(1)
        return self.target - top[:, 0] - total.log()


def linear_logprob_partials(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    vocab_size: int | None = None,
) -> Partials:
    """The log-probs of ``tokens`` given the last hidden states, not merged yet.

        linear_logprob_partials(...).logprobs() = linear_logprob(...)      bit for bit

    Args:
        hidden, weight, tokens, bias, softcap, scale, vocab_size: as in :func:`linear_logprob`.

    Returns:
        :class:`Partials` of one split where torch multiplies: finished log-probs. Where the fused
        kernel does, a split is the tile of a program: 64 ids in float32, 128 in half precision.
    """
    check_shapes(hidden, weight, tokens, bias)
    return Partials(*_operator(hidden, weight, tokens, bias, softcap, scale, vocab_size))


def _torch(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    vocab_size: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = linear_logprob(hidden, weight, tokens, bias, softcap, scale, vocab_size)
    return Partials.of_logprobs(logprobs)


def _triton(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    vocab_size: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    path = split_vocabulary if is_fused(hidden, weight) else _torch
    return path(hidden, weight, tokens, bias, softcap, scale, vocab_size)


def _fake(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    vocab_size: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if runs_triton(hidden.device) and is_fused(hidden, weight):
        return empty_partials(hidden, weight, vocab_size)
    return Partials.of_logprobs(hidden.new_empty(tokens.shape[0], dtype=torch.float32))


_operator = register(
    "linear_logprob_partials(Tensor hidden, Tensor weight, Tensor tokens, Tensor? bias,"
    " float? softcap, float scale, int? vocab_size) -> (Tensor, Tensor, Tensor)",
    torch_path=_torch,
    triton_path=_triton,
    fake=_fake,
)
