"""What a model's attention is like, as a run of a few tokens shows: shape of its KV, limits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from w2s_fast.attention import ATTENTION_NAME, LayerOptions, dense_attention
from w2s_fast.errors import UnsupportedModel
from w2s_fast.models.body import PROBE_TOKENS, probe_ids, refuse, run_body, view_of


class KVShape(NamedTuple):
    """Keys and values of one token: 2 * layers * heads * dim numbers.

    ``max_positions``: up to how many tokens pages give what the model would; None: no limit.
    ``sinks``: whether its attention layers have sinks, logits of no key.
    """

    layers: int
    heads: int
    dim: int
    max_positions: int | None
    sinks: bool


def kv_shape(model: PreTrainedModel, name: str = "base") -> KVShape:
    """Layers, heads and head size of the model's keys and values, seen in a run of a few tokens.

    Raises:
        UnsupportedModel: attention cannot be served from pages; says why.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise refuse(model, name, "it is an encoder-decoder model")
    view = view_of(model, name).model
    _check_attention_interface(view, name)
    probe = Probe()
    try:
        ids = probe_ids(model, PROBE_TOKENS)
        run_body(view, ids, torch.arange(len(ids), device=ids.device), probe)
    except UnsupportedModel:
        raise
    except Exception as error:
        raise refuse(model, name, f"a probe of its attention failed: {error}") from error
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", len(probe.shapes))
    if not probe.shapes:
        raise refuse(model, name, "its class does not call transformers' attention interface")
    if sorted(probe.shapes) != list(range(layers)) or probe.calls != layers:
        raise refuse(
            model,
            name,
            f"{probe.calls} attention calls in {layers} layers: "
            "a layer that is not attention keeps state that pages do not hold",
        )
    if len(set(probe.shapes.values())) != 1:
        raise refuse(model, name, "its layers have keys of different shapes")
    heads, dim = probe.shapes[0]
    limits = (
        getattr(model.config.get_text_config(), "max_position_embeddings", None),
        _window_limit(model, probe),
        _rope_limit(model),
    )
    known = [int(limit) for limit in limits if limit is not None]
    return KVShape(layers, heads, dim, min(known, default=None), probe.sinks)


def _window_limit(model: PreTrainedModel, probe: Probe) -> int | None:
    """The window that some models apply in their mask only: within it there is nothing to mask."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * len(probe.windows)
    told = all(
        probe.windows[layer] is not None
        for layer, kind in enumerate(kinds)
        if kind == "sliding_attention"
    )
    return None if told else int(window)


def _rope_limit(model: PreTrainedModel) -> int | None:
    """Where rotary frequencies begin to follow the longest sequence of the whole pass.

    Longer ones would change their neighbours, and their own earlier tokens.
    """
    config = model.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [p for p in parameters.values() if isinstance(p, dict)]
    for rope in nested or [parameters]:
        if rope.get("rope_type") in ("longrope", "dynamic"):
            limit = rope.get("original_max_position_embeddings")
            limit = limit or getattr(config, "original_max_position_embeddings", None)
            return int(limit or config.max_position_embeddings)
    return None


class Probe:
    """Stands in for a plan: attends within one short sequence and notes what it was given."""

    def __init__(self) -> None:
        self.shapes: dict[int, tuple[int, int]] = {}
        self.windows: dict[int, int | None] = {}
        self.sinks = False
        self.calls = 0

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: LayerOptions,
    ) -> Tensor:
        if key.shape != value.shape:
            raise ValueError(f"keys {tuple(key.shape)} and values {tuple(value.shape)} differ")
        self.calls += 1
        self.shapes[layer] = (key.shape[1], key.shape[2])
        self.windows[layer] = options.window
        self.sinks |= options.sinks is not None
        causal = torch.ones(len(query), len(query), dtype=torch.bool, device=query.device).tril()
        return dense_attention(query[None], key[None], value[None], causal[None], options)[0]


def _check_attention_interface(view: PreTrainedModel, name: str) -> None:
    view.config._attn_implementation = "eager"
    view.set_attn_implementation(ATTENTION_NAME)  # only warns where the class does not allow it
    if view.config._attn_implementation != ATTENTION_NAME:
        raise refuse(view, name, "its class does not use transformers' attention interface")
