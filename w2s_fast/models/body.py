"""Runs a Hugging Face model's own code: its body over one row of tokens, with paged attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from w2s_fast.attention import ATTENTION_NAME, Attends
from w2s_fast.errors import UnsupportedModel

PROBE_TOKENS = 6


def run_body(
    model: PreTrainedModel,
    tokens: Tensor,
    positions: Tensor,
    plan: Attends,
    body: nn.Module | None = None,
) -> Tensor:
    """The model's body over one row of tokens: last hidden states [T, D].

    ``body``: what to run in the place of ``model.base_model``: the same, compiled.
    """
    with attention_switched(model, ATTENTION_NAME), torch.inference_mode():
        out = (model.base_model if body is None else body)(
            input_ids=tokens[None],
            position_ids=positions[None],
            use_cache=False,
            past_key_values=None,
            w2s_plan=plan,
        )
    hidden: Tensor = out.last_hidden_state
    return hidden[0]


def eager_logits(model: PreTrainedModel, tokens: Tensor, name: str) -> Tensor:
    try:
        with attention_switched(model, "eager"), torch.inference_mode():
            logits: Tensor = model(input_ids=tokens[None], use_cache=False).logits
    except Exception as error:
        raise refuse(model, name, f"its own forward failed: {error}") from error
    return logits[0]


@contextmanager
def attention_switched(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """The model with another attention, and afterwards as it was.

    A caller's model object stays usable by itself: ``model.generate`` after a search runs the
    attention it was loaded with. Assigning to the config is what ``set_attn_implementation``
    does in the end, once it has checked that the class allows it.
    """
    config: Any = model.config
    before = config._attn_implementation
    if before != implementation:
        config._attn_implementation = implementation
    try:
        yield
    finally:
        if before != implementation:
            config._attn_implementation = before


def switch_back(model: PreTrainedModel, implementation: str | None) -> None:
    """What :func:`attention_switched` does in the end, where it did not come to it."""
    config: Any = model.config
    if config._attn_implementation == ATTENTION_NAME:
        config._attn_implementation = implementation


def probe_ids(model: PreTrainedModel, count: int) -> Tensor:
    size = int(model.config.get_text_config().vocab_size)
    return torch.arange(1, count + 1, device=model.device) * 7 % size


def refuse(model: PreTrainedModel, name: str, why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{name}: {type(model).__name__} ({model.config.model_type}) cannot be served: {why}"
    )
