"""The attention that Hugging Face models call, and hands what it is given to a plan.

It is registered with transformers' AttentionInterface. The plan travels as a keyword argument of
the model call, so several models never share state.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from w2s_fast.attention.contract import Attends, LayerOptions

ATTENTION_NAME = "w2s_paged"


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
