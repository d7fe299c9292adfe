"""Reads a model from a folder or the hub, and makes sure that it is what stands there, all of it.

transformers draws missing weights at random and leaves out those that it has no place for, with a
warning. Either gives another model than the one that was named, so here both are refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.utils.peft_utils import find_adapter_config_file

from w2s_fast.errors import UnsupportedModel, some_of
from w2s_fast.models.files import ModelFiles

# Constants that older versions of transformers saved with every attention layer.
_CONSTANTS = re.compile(r"(^|\.)(attn\.(masked_)?bias|attention\.(masked_)?bias|inv_freq)$")


def read_config(files: ModelFiles) -> PreTrainedConfig:
    """The config of the causal language model in these files.

    Raises:
        UnsupportedModel: the model is of another kind, or there is an adapter.
        Exception: transformers raises nearly anything for a broken folder.
    """
    _refuse_adapter(files.name)
    config: PreTrainedConfig = AutoConfig.from_pretrained(files.name, **files.options)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"model {files.path!r}: encoder-decoder models cannot be served")
    return config


def read_checkpoint(
    files: ModelFiles,
    config: PreTrainedConfig,
    dtype: torch.dtype | None,
    device: torch.device,
    ranks: int = 1,
) -> PreTrainedModel:
    """The causal language model in these files: on ``device`` if it is quantised, else on the CPU.

    Args:
        config: what :func:`read_config` has found there.
        dtype: None: the checkpoint's own.
        ranks: among how many it is divided: of several each gets its part, as DTensors on its
            accelerator.

    Raises:
        UnsupportedModel: weights are missing, left over or of another shape; says which.
        Exception: transformers raises nearly anything for a broken folder.
    """
    name = files.path
    options: dict[str, Any] = {"dtype": dtype or "auto", **files.options}
    if files.gguf is not None:
        # Some versions would keep packed weights where they have products for them.
        options["quantization_config"] = GgufConfig(dequantize=True)
    elif says_quantised(config) and device.type != "cpu":
        options["device_map"] = {"": device}
    if ranks > 1:
        options["distributed_config"] = DistributedConfig(tp_size=ranks, tp_plan="auto")
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        files.name,
        config=config,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **options,
    )
    model: PreTrainedModel = loaded[0]
    found: dict[str, Any] = loaded[1]
    kind = type(model).__name__
    missing = found["missing_keys"]
    unexpected = [key for key in found["unexpected_keys"] if not _CONSTANTS.search(key)]
    mismatched = [
        f"{key} ({_shape(saved)}, not {_shape(wanted)})"
        for key, saved, wanted in found["mismatched_keys"]
    ]
    if missing:
        raise UnsupportedModel(
            f"model {name!r} lacks weights of {kind}: {some_of(missing)}; a model saved without "
            "its LM head has to be saved again, as a causal language model"
        )
    if mismatched:
        raise UnsupportedModel(
            f"model {name!r} has weights of other shapes than its config says: "
            f"{some_of(mismatched)}"
        )
    if unexpected:
        raise UnsupportedModel(
            f"model {name!r} has weights that {kind} would leave out: {some_of(unexpected)}"
        )
    if found["error_msgs"]:
        raise UnsupportedModel(f"model {name!r}: {some_of(found['error_msgs'])}")
    return model


def says_quantised(config: PreTrainedConfig) -> bool:
    """Whether the checkpoint's weights are packed, and stay so."""
    return getattr(config, "quantization_config", None) is not None


def _refuse_adapter(name: str) -> None:
    adapter = find_adapter_config_file(name)
    if adapter is None:
        return
    raise UnsupportedModel(
        f"model {name!r} is an adapter (adapter_config.json), and what an adapter is for cannot be "
        "another one: merge it into its model with PEFT (merge_and_unload)"
    )


def _shape(size: Collection[int]) -> str:
    return "x".join(map(str, size))
