"""Attention over pages: what plans forward passes, and the function Hugging Face models call.

A forward pass runs all its sequences as one row of T tokens. Before it, a plan is made on the
host: where each token's keys and values are written, and which keys each token may see. During it,
every attention layer calls :func:`paged_attention_forward` through transformers'
AttentionInterface, which hands the layer's tensors to the plan. The plan travels as a keyword
argument of the model call, so several models never share state. One plan serves a whole chunk of
decoding: between the steps it moves on by a token a row, in place and on the device.

Plans are made by a backend, chosen once for each model:

    triton    our own kernels; the default wherever they run, that is, on CUDA
    flash     flash-attn 2 or 3, if installed; it knows nothing of rows that share keys
    torch     plain torch on any device; the default on a CPU
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from w2s_fast.errors import InvalidRequest
from w2s_fast.flash_attention import FlashAttention
from w2s_fast.gathered_attention import GatheredPlan, LayerOptions
from w2s_fast.kernel_attention import KernelPlan
from w2s_fast.kernels.library import BACKEND, HAS_TRITON, runs_triton
from w2s_fast.pages import Ints, PagePool
from w2s_fast.row_tree import RowTree

ATTENTION_NAME = "w2s_paged"
BACKENDS = ("auto", "triton", "flash", "torch")


class Attends(Protocol):
    """What the attention function needs of the ``w2s_plan`` it is given."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: LayerOptions,
    ) -> Tensor:
        """query [T, H, D], key and value [T, Hkv, D] -> [T, H, D]."""
        ...


class AttentionPlan(Attends, Protocol):
    """A plan of passes over one pool.

    Attributes:
        positions: int64 [T], each token's position in its sequence, on the pool's device.
    """

    positions: Tensor

    def advance(self) -> None:
        """Move on to the next pass, of one token a row again.

        Only where every row has one token and the plan was made for passes ahead. No data on the
        device is read by the host, and ``positions`` keeps its address.
        """
        ...


class Backend(Protocol):
    """One way to compute attention over pages."""

    def make(
        self,
        pool: PagePool,
        slots: Ints,
        counts: Ints,
        tree: RowTree | None = None,
        ahead: int = 0,
    ) -> AttentionPlan:
        """Plan ``counts[i]`` new tokens for ``slots[i]``: after ``reserve``, before ``extend``.

        Args:
            tree: which rows share which keys; None: none do.
            ahead: how many passes of one token a row follow on this one, each after
                :meth:`AttentionPlan.advance`. Their room has been reserved, too.
        """
        ...


def paged_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    w2s_plan: Attends | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The ``w2s_paged`` attention of transformers.

    query [1, H, T, D], key and value [1, Hkv, T, D] -> [1, T, H, D]. ``attention_mask`` is None
    for a name that transformers has no mask for; causality and windows follow from the plan.
    """
    if w2s_plan is None:
        raise RuntimeError(f"the {ATTENTION_NAME!r} attention runs only inside a PagedModel")
    out = w2s_plan.attend(
        int(module.layer_idx),  # type: ignore[arg-type]
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        LayerOptions(
            scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
            window=sliding_window,
            softcap=softcap,
            sinks=s_aux,
        ),
    )
    return out[None], None


AttentionInterface.register(ATTENTION_NAME, paged_attention_forward)


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
