"""What follows from the memory there is: tokens of KV cache, and rows of a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from w2s_fast.models.limits import main_memory
from w2s_fast.models.probe import kv_shape

# Shares of the free memory to spend on pages. A GPU's is this program's own; a CPU's is not.
_GPU_SHARE = 0.85
_CPU_SHARE = 0.25

# Rows of a decoding step, where nobody says how many. On a GPU with so many bytes (those sold as
# having 80 GB and more) 1,024 rows are 64 usual searches at once; elsewhere 256 are 16 of them.
_ROWS, _MANY_ROWS = 256, 1024
_LARGE_GPU = 80 * 10**9


# Tokens of a pass, where nobody says how many.
CPU_PASS_TOKENS = 2048


def total_bytes(device: torch.device) -> int:
    """Memory of the device; a CPU's is what this program may use: see :mod:`.limits`."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return main_memory().total


def usual_rows(device_type: str, total: int) -> int:
    """Rows of a decoding step that suit a device of this type, with so many bytes."""
    return _MANY_ROWS if device_type == "cuda" and total >= _LARGE_GPU else _ROWS


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
