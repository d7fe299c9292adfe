"""Which backend computes a model's attention, chosen once for each model.

triton    our own kernels; the default wherever they run, that is, on CUDA
flash     flash-attn 2 or 3, if installed; it knows nothing of rows that share keys
torch     plain torch on any device; the default on a CPU
"""

from __future__ import annotations

import torch

from w2s_fast.attention.contract import Backend
from w2s_fast.attention.flash import FlashAttention
from w2s_fast.attention.gathered import GatheredPlan
from w2s_fast.attention.kernel import KernelPlan
from w2s_fast.errors import InvalidRequest
from w2s_fast.kernels.library import BACKEND, HAS_TRITON, runs_triton

BACKENDS = ("auto", "triton", "flash", "torch")


def find_backend(name: str, device: torch.device) -> Backend:
    """The backend of that name on ``device``; ``"auto"``: triton where it runs, else torch.

    Raises:
        InvalidRequest: there is none of that name, or it cannot run here; says why.
    """
    if name not in BACKENDS:
        raise InvalidRequest(f"attention is {name!r}; allowed: {', '.join(BACKENDS)}")
    if name == "flash":
        return FlashAttention.find(device)
    if name == "torch" or (name == "auto" and not runs_triton(device)):
        return GatheredPlan
    if not runs_triton(device):
        raise InvalidRequest(_why_not_triton(device))
    return KernelPlan


def choose_backend(
    name: str,
    device: torch.device,
    *,
    model: str,
    dtype: torch.dtype,
    page_size: int,
    head_dim: int,
    sinks: bool,
) -> Backend:
    """The backend of one model: :func:`find_backend`, and whether it serves this model.

    Args:
        model: what errors call it.
        dtype: of keys and values. page_size: tokens in a page. head_dim: size of a head.
        sinks: whether attention layers have sinks.

    Raises:
        InvalidRequest: it cannot run here, or not this model; says why, and what to pass instead.
    """
    backend = find_backend(name, device)
    if isinstance(backend, FlashAttention):
        backend.check(model, dtype, page_size, head_dim, sinks)
    return backend


def _why_not_triton(device: torch.device) -> str:
    if BACKEND == "torch":
        return "attention 'triton' is switched off by W2S_FAST_BACKEND=torch: unset it"
    if not HAS_TRITON:
        return "attention 'triton' needs Triton, which is not installed: pip install triton"
    return (
        f"attention 'triton' runs on CUDA devices, and this is {device}: pass attention='torch', "
        "or 'auto'"
    )
