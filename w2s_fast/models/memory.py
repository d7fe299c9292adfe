"""What follows from the memory there is: tokens of KV cache and of a pass, and rows of a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from w2s_fast.models.activations import Activations
from w2s_fast.models.limits import main_memory
from w2s_fast.models.probe import kv_shape

# Shares of the free memory to spend on pages. A GPU's is this program's own; a CPU's is not.
_GPU_SHARE = 0.85
_CPU_SHARE = 0.25

# Rows of a decoding step, where nobody says how many. On a GPU with so many bytes (those sold as
# having 80 GB and more) 1,024 rows are 64 usual searches at once; elsewhere 256 are 16 of them.
_ROWS, _MANY_ROWS = 256, 1024
_LARGE_GPU = 80 * 10**9

# Tokens of a pass, where nobody says how many: so many that reading the weights no longer counts.
# On a GPU half of them, and so on, where their activations would take more than a share of the free
# memory; but not less than the least.
CPU_PASS_TOKENS = 2048
GPU_PASS_TOKENS = 8192
_LEAST_PASS_TOKENS = 512
_PASS_SHARE = 8


def total_bytes(device: torch.device) -> int:
    """Memory of the device; a CPU's is what this program may use: see :mod:`.limits`."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return main_memory().total


def usual_rows(device_type: str, total: int) -> int:
    """Rows of a decoding step that suit a device of this type, with so many bytes."""
    return _MANY_ROWS if device_type == "cuda" and total >= _LARGE_GPU else _ROWS


def usual_pass_tokens(device_type: str, free: int, token_bytes: int) -> int:
    """Tokens of a pass that suit a device of this type.

    Args:
        free: bytes that are. token_bytes: that a pass needs for each token.
    """
    if device_type != "cuda":
        return CPU_PASS_TOKENS
    tokens = GPU_PASS_TOKENS
    while tokens > _LEAST_PASS_TOKENS and tokens * token_bytes > free // _PASS_SHARE:
        tokens //= 2
    return tokens


def free_bytes(device: torch.device) -> int:
    """Memory that is free now, and that this program may take: see :mod:`.limits`."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return main_memory().free


def activation_bytes(found: Sequence[Activations], pass_tokens: int, max_rows: int) -> int:
    """What passes need at most, beside weights and pages.

    Args:
        found: of the model that decodes; then of pairs that run at once, one pair after the other:
            what one pair has used the next one uses again.
    """
    first, *others = found
    pairs = [one.token + other.token for one, other in zip(others[::2], others[1::2])]
    decoding = first.token * max(pass_tokens, max_rows) + first.row * max_rows
    return decoding + max(pairs, default=0) * pass_tokens


def kv_tokens_that_fit(
    models: Sequence[PreTrainedModel], useful_tokens: int, activations: int = 0, sharers: int = 1
) -> int:
    """Tokens of KV cache for each of these models, out of one budget.

    Every model gets room for the same number of tokens, since they hold the same text.

    Args:
        useful_tokens: more than this would never be used.
        activations: bytes that passes need, out of the same budget.
        sharers: processes on this machine that each take as much of a CPU's memory.
    """
    device = models[0].device
    share = _GPU_SHARE if device.type == "cuda" else _CPU_SHARE / sharers
    bytes_per_token = 0
    for model in models:
        shape = kv_shape(model)
        bytes_per_token += 2 * shape.layers * shape.heads * shape.dim * model.dtype.itemsize
    room = int(free_bytes(device) * share) - activations
    return max(1, min(useful_tokens, room // bytes_per_token))
