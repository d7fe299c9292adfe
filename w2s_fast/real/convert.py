"""A GGUF file to an ordinary Hugging Face folder: safetensors in float32, with its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from w2s_fast.models import load_model, load_tokenizer


def unpack(gguf: Path, folder: Path) -> None:
    """Writes the weights as the file unpacks them, each with 32 bits, and all that goes with them.

    Raises:
        UnsupportedModel: the file cannot be read, or packages that read it are missing.
    """
    loaded = load_model(gguf, torch.device("cpu"), "float32")
    tokenizer: Any = load_tokenizer(gguf)
    # transformers saves nothing that came from a GGUF file, unpacked or not.
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):  # its weights are those that were read
        plain = auto.from_config(loaded.config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
