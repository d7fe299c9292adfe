"""What a search takes at least: weights and keys read once, or products computed, by the numbers.

    t_product(N) = max(weight bytes / bandwidth, 2 * parameters * N / rate)
    decode(h)    = sum over l < L of  t_product(B * W * K) + B * kv_bytes * tokens(h, l) / bandwidth
    score(h)     = sum over models of  t_product(B * W * K * L)
                                       + B * kv_bytes * (P + W * h + W * K * L) / bandwidth

for B requests with prompts of P tokens and histories of h. With shared pages a step reads
tokens(h, l) = P + W * h + W * K * l; without, W * K * (P + h + l). Launches, sampling, selection
and the host take no time here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Limits:
    """Of a device. ``bandwidth``: bytes a second; ``rate``: operations a second of a product."""

    bandwidth: float
    rate: float


@dataclass(frozen=True)
class Weights:
    """Of a model. ``parameters``: that every token is multiplied with; ``kv_bytes``: of a token."""

    parameters: int
    kv_bytes: int
    item_bytes: int = 2

    @classmethod
    def of(cls, model: PreTrainedModel) -> Weights:
        """Embeddings are looked up, and count only where they are the LM head as well."""
        head: Any = model.get_output_embeddings()
        looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        looked_up.discard(id(head.weight))
        parameters = sum(p.numel() for p in model.parameters() if id(p) not in looked_up)
        config: Any = model.config
        heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        size = model.dtype.itemsize
        return cls(parameters, 2 * config.num_hidden_layers * heads * dim * size, size)


@dataclass(frozen=True)
class Load:
    """B requests with prompts of P tokens, W hypotheses each, K successors, chunks of L."""

    requests: int
    prompt: int
    width: int = 4
    successors: int = 4
    chunk: int = 5

    @property
    def rows(self) -> int:
        """Of all requests."""
        return self.requests * self.width * self.successors


def product_seconds(weights: Weights, tokens: int, limits: Limits) -> float:
    """A pass over so many tokens, without attention."""
    read = weights.parameters * weights.item_bytes / limits.bandwidth
    return max(read, 2 * weights.parameters * tokens / limits.rate)


def decode_seconds(
    base: Weights, load: Load, history: int, limits: Limits, *, shared: bool = True
) -> float:
    """A chunk, behind hypotheses of ``history`` tokens."""
    rows = load.width * load.successors
    seconds = load.chunk * product_seconds(base, load.rows, limits)
    for own in range(load.chunk):
        tokens = load.prompt + load.width * history + rows * own
        if not shared:
            tokens = rows * (load.prompt + history + own)
        seconds += load.requests * base.kv_bytes * tokens / limits.bandwidth
    return seconds


def score_seconds(models: Sequence[Weights], load: Load, history: int, limits: Limits) -> float:
    """The same chunk in the models of all guides."""
    tokens = load.prompt + load.width * history + load.width * load.successors * load.chunk
    return sum(
        product_seconds(model, load.rows * load.chunk, limits)
        + load.requests * model.kv_bytes * tokens / limits.bandwidth
        for model in models
    )


def chunks(chunk: int, new_tokens: int) -> Iterator[tuple[int, int]]:
    """(tokens before it, its tokens) of each chunk of a response."""
    for history in itertools.count(0, chunk):
        if history >= new_tokens:
            return
        yield history, min(chunk, new_tokens - history)
