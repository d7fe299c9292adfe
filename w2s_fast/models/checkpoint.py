"""Reads a model from a folder or the hub, and makes sure that it is what stands there, all of it.

transformers draws missing weights at random and leaves out those that it has no place for, with a
warning. Either gives another model than the one that was named, so here both are refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from w2s_fast.errors import UnsupportedModel

# Constants that older versions of transformers saved with every attention layer.
_CONSTANTS = re.compile(r"(^|\.)(attn\.(masked_)?bias|attention\.(masked_)?bias|inv_freq)$")
_MOST_NAMED = 5


def read_checkpoint(name: str, options: dict[str, Any]) -> PreTrainedModel:
    """The causal language model at a path or hub id, on the CPU.

    Args:
        options: for transformers' ``from_pretrained``.

    Raises:
        UnsupportedModel: the model is of another kind, weights are missing, left over or of
            another shape, or there is an adapter; says which.
        Exception: transformers raises nearly anything for a broken folder.
    """
    _refuse_adapter(name)
    config = AutoConfig.from_pretrained(name)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"model {name!r}: encoder-decoder models cannot be served")
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        name, output_loading_info=True, ignore_mismatched_sizes=True, **options
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
            f"model {name!r} lacks weights of {kind}: {_named(missing)}; a model saved without its "
            "LM head has to be saved again, as a causal language model"
        )
    if mismatched:
        raise UnsupportedModel(
            f"model {name!r} has weights of other shapes than its config says: {_named(mismatched)}"
        )
    if unexpected:
        raise UnsupportedModel(
            f"model {name!r} has weights that {kind} would leave out: {_named(unexpected)}"
        )
    if found["error_msgs"]:
        raise UnsupportedModel(f"model {name!r}: {_named(found['error_msgs'])}")
    return model


def _refuse_adapter(name: str) -> None:
    adapter = find_adapter_config_file(name)
    if adapter is None:
        return
    beside = os.path.isfile(os.path.join(os.path.dirname(adapter), "config.json"))
    what = "an adapter beside a model" if beside else "only an adapter"
    raise UnsupportedModel(
        f"model {name!r} holds {what} (adapter_config.json); adapters are not applied: merge it "
        "into its model with PEFT (merge_and_unload) and save that in a folder of its own"
    )


def _shape(size: Collection[int]) -> str:
    return "x".join(map(str, size))


def _named(keys: Collection[str]) -> str:
    first = ", ".join(sorted(keys)[:_MOST_NAMED])
    more = len(keys) - _MOST_NAMED
    return f"{first} and {more} more" if more > 0 else first
