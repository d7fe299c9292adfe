"""What a model's generation config says about sampling, in the words of SearchParams."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from w2s_fast.errors import InvalidRequest

# Those that mean the same, by their names there.
_ALIKE = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "max_new_tokens": "max_new_tokens",
    "min_new_tokens": "min_new_tokens",
    "stop_strings": "stop",
    "length_penalty": "length_penalty",
    "early_stopping": "early_stopping",
}
# Those that change what is sampled and have no counterpart, with the value that does nothing.
_OTHERS: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "bad_words_ids": None,
    "sequence_bias": None,
    "guidance_scale": None,
}
_FILE = "generation_config.json"


def settings_of(source: Any) -> dict[str, Any]:
    """Fields of SearchParams that a generation config sets.

    Warns of settings that change what is sampled and have no counterpart.

    Args:
        source: a loaded model, its generation config, the same as a dict, or the folder where it
            lies.

    Raises:
        InvalidRequest: it is nothing of these, or the folder holds no such config.
    """
    get = _reader(source)
    found = {ours: get(name) for name, ours in _ALIKE.items() if get(name) is not None}
    if get("do_sample") is False:
        found["temperature"] = 0.0
    left_out = [
        f"{name}={get(name)!r}"
        for name, nothing in _OTHERS.items()
        if get(name) is not None and get(name) != nothing
    ]
    if left_out:
        told = ", ".join(left_out)
        warnings.warn(f"the generation config has {told}, which are left out here", stacklevel=3)
    return found


def _reader(source: Any) -> Callable[[str], Any]:
    """From a name to its value; None: it is not set."""
    if isinstance(source, (str, os.PathLike)):
        source = _from_folder(Path(source).expanduser())
    source = getattr(source, "generation_config", None) or source
    if isinstance(source, Mapping):
        return source.get
    if not hasattr(source, "top_p"):
        raise InvalidRequest(
            f"a generation config is {type(source).__name__}; allowed: a loaded model, its "
            "generation config, a dict, or a model's folder"
        )
    return lambda name: getattr(source, name, None)


def _from_folder(path: Path) -> dict[str, Any]:
    file = path / _FILE
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidRequest(
            f"{file} cannot be read: {error}; allowed: a model's folder that holds it. Of a hub id "
            "transformers' GenerationConfig.from_pretrained reads it"
        ) from error
    if not isinstance(found, dict):
        raise InvalidRequest(f"{file} holds no object")
    return found
