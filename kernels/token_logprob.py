"""log p(token) of given tokens from logits: log-softmax in float32, then a gather."""

from __future__ import annotations

import torch
from torch import Tensor


def token_logprob(
    logits: Tensor,
    tokens: Tensor,
    *,
    vocab_size: int | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Log-probs of ``tokens`` under softmax(softcap * tanh(scale * logits / softcap)).

    Args:
        logits: [N, V] of any float dtype.
        tokens: int64 [N], ids below ``vocab_size``.
        vocab_size: ids from here on are padding: outside of the softmax. None: V.
        scale: factor on the logits. softcap: None is off.

    Returns:
        float32 [N], in nats.
    """
    logits = logits[:, :vocab_size].float()
    if scale != 1.0:
        logits = logits * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
