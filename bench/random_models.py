"""Models of known shapes with random weights: as fast as trained ones, and nothing to download."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

# Nothing ends a response before its time.
_NO_ENDS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def gpt2(layers: int, width: int, heads: int, vocabulary: int = 50_257) -> GPT2Config:
    """A GPT-2."""
    return GPT2Config(
        vocab_size=vocabulary, n_layer=layers, n_embd=width, n_head=heads, **_NO_ENDS
    )  # fmt: skip


def llama(
    layers: int,
    width: int,
    heads: int,
    kv_heads: int,
    inner: int,
    vocabulary: int,
    *,
    tied: bool = False,
) -> LlamaConfig:
    """A Llama; Mistral's 7B is one, too, but for its window."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=tied,
        **_NO_ENDS,
    )


def qwen3(
    layers: int, width: int, heads: int, kv_heads: int, dim: int, inner: int, vocabulary: int
) -> Qwen3Config:
    """A Qwen3 whose embeddings are its LM head."""
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=dim,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        **_NO_ENDS,
    )


TINY = llama(1, 32, 4, 2, 64, 97)
GPT2 = gpt2(12, 768, 12)
GPT2_XL = gpt2(48, 1600, 25)
# Of a guide of about 150 million parameters, and of Llama 3.2 1B.
SMALL = llama(12, 768, 12, 4, 2048, 128_256, tied=True)
MEDIUM = llama(16, 2048, 32, 8, 8192, 128_256, tied=True)
# Of Llama 3.1 8B: of a 7B as well, whose layers are the same, where it guides that one.
LARGE = llama(32, 4096, 32, 8, 14_336, 128_256)
QWEN3 = qwen3(28, 2048, 16, 8, 128, 6144, 151_936)  # 1.7B


def make(
    config: PreTrainedConfig, seed: int, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    """A model in eval mode, drawn on the device, with transformers' default attention."""
    torch.manual_seed(seed)
    with device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=dtype
        )
    return model.eval()


def prompts_for(config: PreTrainedConfig, count: int, tokens: int) -> list[list[int]]:
    """Prompts that do not begin alike, so that nothing of them is computed once for all."""
    vocabulary = config.vocab_size
    return [[(7 * i + j + 1) % vocabulary for j in range(tokens)] for i in range(count)]
