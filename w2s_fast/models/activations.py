"""What a pass needs of memory beside weights and pages, seen in passes of a few hundred tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from w2s_fast.attention import LayerOptions
from w2s_fast.models.body import probe_ids, run_body, view_of
from w2s_fast.models.lm_head import LMHead
from w2s_fast.models.probe import kv_shape

# What the most memory is that a piece of work has in use at one time, in bytes.
Peak: TypeAlias = Callable[[Callable[[], object]], int]

_TOKENS = 256  # and twice as many
_ROWS = 32


class Activations(NamedTuple):
    """What one model's work needs, in bytes.

    Attributes:
        token: for each token of a pass, up to its log-prob.
        row: for the logits of each row of a decoding step.
        head: for its padded head, which is there all the time; see :class:`LMHead`.
    """

    token: int
    row: int
    head: int = 0


def activations_of(model: PreTrainedModel, peak: Peak | None = None) -> Activations:
    """Of this model, as far as they grow with tokens and rows; without what attention needs.

    Args:
        peak: how memory is measured; None: CUDA's allocator is asked.

    Raises:
        UnsupportedModel: it cannot be served from pages; says why.
    """
    peak = peak or partial(_peak_on_cuda, model.device)
    kv_shape(model, "model")  # which says why a model cannot be served
    view = view_of(model, "model").model
    head = LMHead(view, "model")

    def run(tokens: int) -> Tensor:
        ids = probe_ids(model, tokens)
        # Positions that every model has.
        hidden = run_body(view, ids, torch.zeros_like(ids), _NoAttention())
        head.token_partials(hidden, ids, None).logprobs()
        return hidden

    with torch.inference_mode():
        hidden = run(2 * _TOKENS)  # what is set up once is set up
        token = (peak(lambda: run(2 * _TOKENS)) - peak(lambda: run(_TOKENS))) // _TOKENS
        few, many = hidden[:_ROWS], hidden[: 2 * _ROWS]
        row = (peak(lambda: head.logits(many)) - peak(lambda: head.logits(few))) // _ROWS
    return Activations(max(0, token), max(0, row), head.padded_bytes)


def _peak_on_cuda(device: torch.device, work: Callable[[], object]) -> int:
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before


class _NoAttention:
    """Stands in for a plan: there are no pages yet."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: LayerOptions
    ) -> Tensor:
        # Attention keeps the shape of queries where keys and values have one width.
        return torch.zeros_like(query)
