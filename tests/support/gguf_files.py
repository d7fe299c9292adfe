"""Tiny models as GGUF files, written as llama.cpp's converter does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.support.tiny_models import tiny_model

_NORMAL, _CONTROL = 1, 3  # llama.cpp's types of tokens

_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_LAYERS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


MERGES = [("t", "h"), ("th", "e"), ("\u0120", "f")]
VOCABULARY = 256 + 2 + len(MERGES)
BOS, EOS = 256, 257


def needs_gguf() -> Any:
    """The package that writes them; skips where transformers would not read them."""
    pytest.importorskip("accelerate")
    if Version(transformers.__version__) < Version("5.23"):
        pytest.skip("GGUF files need transformers 5.23")
    return pytest.importorskip("gguf")


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, BOS, EOS and a few merges: of a file without any transformers reads no vocabulary."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<bos>", "<eos>"]
    tokens += ["".join(pair) for pair in MERGES]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")


def gguf_llama(seed: int = 0) -> PreTrainedModel:
    """What :func:`write_gguf` can write: as large as its vocabulary."""
    return tiny_model(
        "llama", seed=seed, vocab_size=VOCABULARY, dtype=torch.float32, eos=(EOS,), bos=BOS
    )


def write_gguf(path: Path, model: PreTrainedModel, packed: bool = False) -> Path:
    """A Llama and :func:`merging_tokenizer` in one file.

    Args:
        packed: weights of matrices as Q8_0, blocks of 32 numbers in 8 bits, where rows allow it.
    """
    gguf = needs_gguf()
    path.parent.mkdir(parents=True, exist_ok=True)
    config: Any = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    tokenizer = merging_tokenizer()
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = {tokenizer.bos_token, tokenizer.eos_token}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([_CONTROL if token in special else _NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(True)
    for name, weight in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        rotated = next((n for part, n in heads.items() if part in name), None)
        numbers = (weight if rotated is None else _interleaved(weight, rotated)).float().numpy()
        kind = gguf.GGMLQuantizationType.Q8_0
        if packed and numbers.ndim == 2 and numbers.shape[1] % 32 == 0:
            writer.add_tensor(_gguf_name(name), gguf.quantize(numbers, kind), raw_dtype=kind)
        else:
            writer.add_tensor(_gguf_name(name), numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_name(name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
    layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
    return f"blk.{layer}.{_IN_LAYERS[part]}.weight"


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp turns neighbours together, transformers halves of a head."""
    halves = weight.reshape(heads, 2, -1, weight.shape[-1])
    return halves.transpose(1, 2).reshape(weight.shape).contiguous()


def rounded_to_blocks(weight: Tensor) -> Tensor:
    """A matrix [V, D] as Q8_0 keeps it: each block of 32 in steps of its largest by 127."""
    blocks = weight.float().reshape(len(weight), -1, 32)
    step = blocks.abs().amax(-1, keepdim=True) / 127
    numbers = torch.where(step > 0, blocks / step, 0).round()
    return (numbers * step.half().float()).reshape(weight.shape)
