"""How many tokens of KV cache fit into the memory that is free."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from w2s_fast.models.limits import main_memory
from w2s_fast.models.probe import kv_shape

# Shares of the free memory to spend on pages. A GPU's is this program's own; a CPU's is not.
_GPU_SHARE = 0.85
_CPU_SHARE = 0.25


def free_bytes(device: torch.device) -> int:
    """Memory that is free now, and that this program may take: see :mod:`.limits`."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return main_memory().free


def kv_tokens_that_fit(models: Sequence[PreTrainedModel], useful_tokens: int) -> int:
    """Tokens of KV cache for each of these models, out of one budget.

    Every model gets room for the same number of tokens, since they hold the same text.
    ``useful_tokens``: more than this would never be used.
    """
    device = models[0].device
    share = _GPU_SHARE if device.type == "cuda" else _CPU_SHARE
    bytes_per_token = 0
    for model in models:
        shape = kv_shape(model)
        bytes_per_token += 2 * shape.layers * shape.heads * shape.dim * model.dtype.itemsize
    return max(1, min(useful_tokens, int(free_bytes(device) * share) // bytes_per_token))
