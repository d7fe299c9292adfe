"""From a path, a hub id or a loaded model to a model and a tokenizer that can be served."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeAlias

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from w2s_fast.errors import InvalidRequest, UnsupportedModel
from w2s_fast.models.checkpoint import read_checkpoint

ModelSource: TypeAlias = str | os.PathLike[str] | PreTrainedModel


def pick_device(device: str | torch.device) -> torch.device:
    """``"auto"`` is a GPU if torch sees one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
        torch.empty(0, device=picked)
    except (RuntimeError, AssertionError) as error:
        raise InvalidRequest(f"device {device!r} cannot be used: {error}") from error
    return picked


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype | None:
    """The dtype of weights and KV. ``"auto"``: float32 on a CPU, else None, see :func:`read_as`.

    Half precision on a CPU is slower than float32 wherever the CPU has no instructions for it.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else None
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InvalidRequest(
            f"dtype is {dtype!r}; allowed: auto, float32, float16, bfloat16, float64"
        )
    return found


def read_as(checkpoint: torch.dtype, device: torch.device) -> torch.dtype:
    """What ``"auto"`` reads a checkpoint of this dtype as, on a device that is no CPU.

    A checkpoint in half precision stays as it is. One in float32 becomes bfloat16 on CUDA from
    compute capability 8.0 on, since a step takes as long as its weights take to be read. Earlier
    GPUs have no products in bfloat16, and float16 ends at 65,504, where float32 does not.
    """
    if checkpoint is not torch.float32 or device.type != "cuda":
        return checkpoint
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else checkpoint


def load_model(
    source: ModelSource, device: torch.device, dtype: str | torch.dtype
) -> PreTrainedModel:
    """The model, on ``device``.

    A loaded model keeps its own dtype for ``"auto"``; it is moved in place where it must be, and
    otherwise left as it is.

    Raises:
        InvalidRequest: that is nothing a model can be named by.
        UnsupportedModel: the folder or id cannot be read as a causal language model, or does not
            hold the whole of one; says what is missing or left over.
    """
    if isinstance(source, PreTrainedModel):
        wanted = None if dtype == "auto" else pick_dtype(dtype, device)
        if source.device != device or (wanted is not None and source.dtype != wanted):
            nn.Module.to(source, device=device, dtype=wanted)
        return source
    if not isinstance(source, (str, os.PathLike)):
        raise InvalidRequest(
            f"a model is {source!r}; allowed: a path, a hub id, or a loaded model of transformers"
        )
    name = os.path.expanduser(os.fspath(source))
    wanted = pick_dtype(dtype, device)
    _check_path(name)
    try:
        model = read_checkpoint(name, {"dtype": wanted or "auto"})
        as_half = read_as(model.dtype, device)
        if wanted is None and as_half is not model.dtype:
            # Read once more: converted afterwards, what has to stay in float32 would not.
            del model
            model = read_checkpoint(name, {"dtype": as_half})
    except UnsupportedModel:
        raise
    except Exception as error:  # transformers raises nearly anything for a broken folder
        raise UnsupportedModel(f"model {name!r} cannot be loaded: {_first_line(error)}") from error
    nn.Module.to(model, device)
    nn.Module.eval(model)
    return model


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies with the model; None where there is none.

    Raises:
        UnsupportedModel: there are tokenizer files, but they cannot be read.
    """
    loaded = isinstance(source, PreTrainedModel)
    path = source.name_or_path if isinstance(source, PreTrainedModel) else os.fspath(source)
    name = os.path.expanduser(path or "")
    if not name or (loaded and not os.path.isdir(name)):
        return None  # a loaded model without a folder: ask nobody's network for a tokenizer
    if os.path.isdir(name) and not _has_tokenizer(Path(name)):
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise UnsupportedModel(
            f"tokenizer of {name!r} cannot be loaded: {_first_line(error)}"
        ) from error
    return tokenizer


def _check_path(name: str) -> None:
    if not name:
        raise UnsupportedModel("a model's path or hub id is empty")
    path = Path(name)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not path.is_dir():
        raise UnsupportedModel(f"model {name!r}: there is no such folder")
    names = ("config.json", "adapter_config.json")
    if path.is_dir() and not any((path / name).is_file() for name in names):
        raise UnsupportedModel(f"model {name!r}: the folder holds no config.json")


def _has_tokenizer(folder: Path) -> bool:
    names = (
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    )
    return any((folder / name).is_file() for name in names)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
