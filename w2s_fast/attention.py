"""Attention over pages: the plan of one forward pass, and the function Hugging Face models call.

A forward pass runs all its sequences as one row of T tokens. Before it, a plan is made on the
host: where each token's keys and values are written, and which keys each token may see. During it,
every attention layer calls :func:`paged_attention_forward` through transformers'
AttentionInterface, which hands the layer's tensors to the plan. The plan travels as a keyword
argument of the model call, so several models never share state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface

from w2s_fast.gathered_attention import GatheredPlan, LayerOptions
from w2s_fast.kernels.library import runs_triton
from w2s_fast.kernels.paged_attention import paged_attention
from w2s_fast.kernels.write_kv import write_kv
from w2s_fast.pages import Ints, PagePool

ATTENTION_NAME = "w2s_paged"


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


@dataclass
class KernelPlan:
    """One forward pass over a pool through the operators write_kv and paged_attention.

    Attributes:
        pool: the pages of the model that runs.
        write: int64 [T] positions in the pages for the new keys and values.
        positions: int64 [T], each token's position in its sequence.
        page_table: int32 [S, M]. lengths: int32 [S], new tokens included. cu_seqlens_q:
            int32 [S + 1], where each sequence's new tokens begin.
        max_q, max_k: the most new tokens and the most keys of a sequence.
    """

    pool: PagePool
    write: Tensor
    positions: Tensor
    page_table: Tensor
    lengths: Tensor
    cu_seqlens_q: Tensor
    max_q: int
    max_k: int

    @classmethod
    def make(cls, pool: PagePool, slots: Ints, counts: Ints) -> KernelPlan:
        """Plan ``counts[i]`` new tokens for ``slots[i]``: after ``reserve``, before ``extend``."""
        new = np.asarray(counts, np.int32)
        old = pool.lengths(slots)
        start = np.concatenate(([0], new.cumsum())).astype(np.int32)
        offset = np.arange(start[-1]) - np.repeat(start[:-1], new)

        def on_device(array: NDArray[np.integer]) -> Tensor:
            return torch.from_numpy(array).to(pool.device, non_blocking=True)

        return cls(
            pool=pool,
            write=pool.slot_mapping(slots, counts),
            positions=on_device(np.repeat(old, new).astype(np.int64) + offset),
            page_table=pool.page_table(slots),
            lengths=on_device(old + new),
            cu_seqlens_q=on_device(start),
            max_q=int(new.max()),
            max_k=int((old + new).max()),
        )

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: LayerOptions,
    ) -> Tensor:
        """Write the new keys and values, then attend over all of each sequence's pages."""
        pages = self.pool.kv[layer]
        write_kv(key, value, pages, self.write)
        return paged_attention(
            query,
            pages,
            self.page_table,
            self.lengths,
            self.cu_seqlens_q,
            **options._asdict(),
            max_q=self.max_q,
            max_k=self.max_k,
        )


def make_plan(pool: PagePool, slots: Ints, counts: Ints) -> KernelPlan | GatheredPlan:
    """Plan ``counts[i]`` new tokens for ``slots[i]``: after ``reserve``, before ``extend``.

    Kernels serve wherever Triton does, and gathered rows and dense products elsewhere.
    """
    plan = KernelPlan if runs_triton(pool.device) else GatheredPlan
    return plan.make(pool, slots, counts)
