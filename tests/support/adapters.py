"""Adapters as PEFT saves them, of tiny models, and what PEFT itself computes with them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

# What a family calls its linear modules.
LINEAR = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}


def save_adapter(
    model: PreTrainedModel, folder: Path, *, seed: int = 0, size: float = 0.4, **settings: Any
) -> Path:
    """A folder with an adapter that changes what the model says a good deal; the model stays.

    ``settings``: of PEFT's LoraConfig. ``size``: of the weights that are drawn.
    """
    from peft import LoraConfig, get_peft_model

    settings = {"r": 3, "lora_alpha": 5, "task_type": "CAUSAL_LM", **settings}
    config = LoraConfig(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tuned = get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=False)
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn_like(parameter)
                if "lora_" in name and "magnitude" not in name:
                    parameter.data.copy_(size * noise)
                else:  # it has the values of the model's own
                    parameter.data.mul_(1 + size * noise)
        tuned.save_pretrained(folder)
    return folder


def with_adapter(model: PreTrainedModel, folder: Path, *, merge: bool = False) -> PreTrainedModel:
    """A copy of the model as PEFT runs it with the adapter, or with its weights merged."""
    from peft import PeftModel

    loaded: Any = PeftModel.from_pretrained(
        copy.deepcopy(model), folder, autocast_adapter_dtype=False
    )
    found: PreTrainedModel = loaded.merge_and_unload() if merge else loaded.base_model.model
    return found.eval()
