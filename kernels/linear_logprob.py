"""log p(token) from hidden states: LM head, log-softmax and gather, a block of rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from w2s_fast.kernels.token_logprob import token_logprob

# Logits of one block, float32: small enough to stay in the cache between the matrix product
# and the two passes over it, large enough for the product to run at its full rate.
_BLOCK_BYTES = 16 * 2**20


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """Log-probs of ``tokens`` given the last hidden states.

    Args:
        hidden: [N, D]. weight: [V, D], same dtype. bias: [V] or None.
        tokens: int64 [N], ids below ``vocab_size``.
        softcap, scale, vocab_size: as in :func:`token_logprob`.

    Returns:
        float32 [N], in nats. At most a block of the [N, V] logits exists at a time.
    """
    rows = max(1, _BLOCK_BYTES // (4 * weight.shape[0]))
    blocks = [
        token_logprob(
            torch.nn.functional.linear(hidden[start : start + rows], weight, bias),
            tokens[start : start + rows],
            vocab_size=vocab_size,
            scale=scale,
            softcap=softcap,
        )
        for start in range(0, len(tokens), rows)
    ]
    return torch.cat(blocks) if blocks else hidden.new_zeros(0, dtype=torch.float32)
