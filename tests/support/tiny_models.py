"""Tiny random models of several families, and a byte-level tokenizer to go with them.

The weights are drawn here, not by transformers, so that next-token distributions are peaked and
differ from step to step: with transformers' small initial weights every distribution is nearly
uniform, and a wrong position, mask or cache could hide.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers import processors as post_processors
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

FAMILIES = ("gpt2", "llama", "qwen3", "mistral", "gemma2", "phi3", "mixtral")
VOCABULARY = 20
WINDOW = 4  # of the families with a sliding window: shorter than any test's text
MAX_POSITIONS = 128
BYTE_VOCABULARY = 258  # 256 bytes, BOS, EOS


def _config(family: str, vocab_size: int, layers: int, **more: Any) -> PreTrainedConfig:
    if family == "gpt2":
        return GPT2Config(
            vocab_size=vocab_size, n_positions=MAX_POSITIONS, n_embd=16, n_layer=layers, n_head=2,
            **more,
        )  # fmt: skip
    classes: dict[str, type[PreTrainedConfig]] = {
        "llama": LlamaConfig,
        "qwen3": Qwen3Config,
        "mistral": MistralConfig,
        "gemma2": Gemma2Config,
        "phi3": Phi3Config,
        "mixtral": MixtralConfig,
    }
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_POSITIONS,
        "pad_token_id": None,
    }
    own: dict[str, dict[str, Any]] = {
        "qwen3": {"head_dim": 8},
        "mistral": {"sliding_window": WINDOW, "head_dim": 8},
        "gemma2": {
            "sliding_window": WINDOW,
            "head_dim": 8,
            "query_pre_attn_scalar": 5,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 6.0,
        },
        "phi3": {"sliding_window": None},
        "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    }
    return classes[family](**{**sizes, **own.get(family, {}), **more})


@functools.cache
def tiny_model(
    family: str = "llama",
    *,
    seed: int = 0,
    vocab_size: int = VOCABULARY,
    layers: int = 2,
    dtype: torch.dtype = torch.float64,
    eos: tuple[int, ...] = (0,),
    peak: float = 2.0,
    bos: int | None = 1,
    instance: str = "",
) -> PreTrainedModel:
    """A model in eval mode with eager attention; the same arguments give the same object.

    Args:
        peak: standard deviation of its logits, roughly. 0 is uniform.
        instance: a name, for another object with the same weights.
    """
    eos_ids: Any = {0: None, 1: eos[0] if eos else None}.get(len(eos), list(eos))
    config = _config(family, vocab_size, layers, bos_token_id=bos, eos_token_id=eos_ids)
    if family == "mixtral" and dtype is torch.float64:
        config._experts_implementation = "eager"  # torch's grouped product has no float64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", dtype=torch.float32
        )
    draw_weights(model, seed, peak)
    model.generation_config.eos_token_id = eos_ids
    model.generation_config.bos_token_id = bos
    model.generation_config.pad_token_id = None
    return model.to(dtype).eval()


def tiny_rope(kind: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A Phi-3 with ``"longrope"``, or a Llama with ``"dynamic"`` rope.

    Their own code follows the longest text of a pass. For that the latter asks the device in every
    pass, and the former does so up to some version of transformers after 5.17.
    """
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    more: dict[str, Any] = {}
    if kind == "longrope":
        rope |= {"short_factor": [1.0, 1.0], "long_factor": [2.0, 4.0]}
        more = {"original_max_position_embeddings": 64}
    family = "phi3" if kind == "longrope" else "llama"
    config = _config(
        family, VOCABULARY, 2, rope_parameters=rope, bos_token_id=1, eos_token_id=None, **more
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    draw_weights(model, seed=0, peak=2.0)
    return model.to(dtype).eval()


def draw_weights(model: PreTrainedModel, seed: int, peak: float) -> None:
    """Activations of size one throughout, logits of size ``peak``; the same at every dtype."""
    generator = torch.Generator().manual_seed(seed)
    head = model.get_output_embeddings().weight
    embeddings = model.get_input_embeddings().weight
    width = head.shape[1]
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter is head:  # tied or not: the hidden state before it has size one
            value = noise * peak / width**0.5
        elif parameter is embeddings or "wpe" in name:
            value = noise
        elif parameter.ndim == 1:
            value = 0.1 * noise + (
                name.endswith("weight") and "gemma" not in model.config.model_type
            )
        else:
            value = noise * 1.5 / width**0.5
        parameter.data.copy_(value)


class Triple(NamedTuple):
    """What a search needs."""

    base: PreTrainedModel
    tuned: PreTrainedModel
    untuned: PreTrainedModel


def tiny_triple(
    families: Sequence[str] = ("llama", "gpt2", "gpt2"),
    *,
    seed: int = 0,
    layers: int = 1,
    **options: Any,
) -> Triple:
    """A base, a tuned guide and an untuned one, with different weights.

    Of one layer: what a search does does not depend on more, and most of a test's time is theirs.
    """
    base, tuned, untuned = (
        tiny_model(family, seed=3 * seed + i, layers=layers, **options)
        for i, family in enumerate(families)
    )
    return Triple(base, tuned, untuned)


def byte_tokenizer(*, eos: str = "<eos>", bos: str | None = "<bos>") -> PreTrainedTokenizerFast:
    """Every byte is a token; BOS is put before a text if there is one.

    The ids of the bytes are those of the sorted byte-level alphabet, then BOS, then EOS.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(alphabet)}
    vocabulary[bos or "<unused>"] = 256
    vocabulary[eos] = 257
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos is not None:
        tokenizer.post_processor = post_processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, 256)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token=bos)


def save_tiny(
    folder: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerFast | None = None,
    vocab_size: int = BYTE_VOCABULARY,
    **options: Any,
) -> Path:
    """A model and a tokenizer in a folder, as a hub's snapshot has them; float32."""
    options = {"dtype": torch.float32, "eos": (257,), "bos": 256, **options}
    model = tiny_model(family, seed=seed, vocab_size=vocab_size, **options)
    model.save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return folder


def save_trio(root: Path) -> Path:
    """Folders ``llama``, a base that ranks can divide, ``tuned`` and ``untuned``, a guide of it."""
    save_tiny(root / "llama", "llama", seed=3)
    save_tiny(root / "tuned", "gpt2", seed=1)
    save_tiny(root / "untuned", "gpt2", seed=2)
    return root
