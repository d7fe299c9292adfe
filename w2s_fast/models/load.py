"""From a path, a hub id or a loaded model to a model and a tokenizer that can be served."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TypeAlias

import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from w2s_fast.errors import InvalidRequest, UnsupportedModel
from w2s_fast.models.adapters import find_adapter
from w2s_fast.models.bars import no_bars
from w2s_fast.models.checkpoint import read_checkpoint, read_config, says_quantised
from w2s_fast.models.files import ModelFiles, check_packages, find_files, looks_local
from w2s_fast.models.ranks import Ranks, check_environment
from w2s_fast.models.sharding import own_part, why_not

_log = logging.getLogger(__name__)

ModelSource: TypeAlias = str | os.PathLike[str] | PreTrainedModel


def pick_device(device: str | torch.device) -> torch.device:
    """``"auto"`` is a GPU if torch sees one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
        torch.empty(0, device=picked)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InvalidRequest(f"device {device!r} cannot be used: {error}") from error
    return picked


def exact_device(device: torch.device) -> torch.device:
    """The same device, by the name that tensors on it have: ``"cuda"`` is one with a number."""
    return torch.empty(0, device=device).device


def device_of_rank(device: str | torch.device, size: int) -> torch.device:
    """``device`` as this rank of so many has it: ``"auto"`` and ``"cuda"`` are the GPU of its
    number on its machine.

    transformers puts a model's parts on the accelerator that it finds, and on the CPU where there
    is none.

    Raises:
        InvalidRequest: this is none of so many ranks, or the device is another's, or one where no
            model is read.
    """
    check_environment(size)
    own = int(os.environ.get("LOCAL_RANK", 0))
    wanted = pick_device(device)
    if (wanted.type == "cuda") != torch.cuda.is_available():
        raise InvalidRequest(
            f"device {device!r} with tensor_parallel; allowed: "
            f"{'cuda' if torch.cuda.is_available() else 'cpu'}, where this machine's ranks run"
        )
    if wanted.type != "cuda":
        return wanted
    if wanted.index not in (None, own):
        raise InvalidRequest(f"device {device!r} of rank {own} on its machine; allowed: cuda")
    torch.cuda.set_device(own)
    return torch.device("cuda", own)


def check_shardable(source: ModelSource, size: int) -> None:
    """Whether so many ranks can hold this model together, before any weights are read.

    Raises:
        InvalidRequest: it is loaded already, or an adapter; or that is no model's name.
        UnsupportedModel: it is packed, has no plan for it, or heads that cannot be dealt out.
    """
    if isinstance(source, PreTrainedModel):
        raise InvalidRequest(
            "tensor_parallel with a loaded model as the base; allowed: its path or hub id, of "
            "which each rank reads its own part"
        )
    if find_adapter(source) is not None:
        raise InvalidRequest("tensor_parallel with an adapter as the base; allowed: a whole model")
    config = look_at_model(source)
    files = find_files(source)
    if files.gguf is not None:
        why: str | None = "it is a GGUF file"
    else:
        why = "its weights are quantised" if says_quantised(config) else why_not(config, size)
    if why is not None:
        raise UnsupportedModel(
            f"model {files.path!r} ({config.model_type}) cannot be divided among {size} ranks: "
            f"{why}"
        )


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


def look_at_model(source: ModelSource) -> PreTrainedConfig:
    """The config of a model, before any of its weights are read.

    Raises:
        InvalidRequest: that is nothing a model can be named by.
        UnsupportedModel: the path or id cannot be read as a causal language model.
    """
    if isinstance(source, PreTrainedModel):
        return source.config
    if not isinstance(source, (str, os.PathLike)):
        given = type(source).__name__ if isinstance(source, nn.Module) else repr(source)
        hint = ""
        if hasattr(source, "merge_and_unload"):
            hint = ": the folder of its adapter (save_pretrained), or what merge_and_unload() makes"
        raise InvalidRequest(
            f"a model is {given}; allowed: a path, a hub id, or a loaded model of transformers"
            f"{hint}"
        )
    files = find_files(source)
    _check_path(files)
    with _loading(files):
        return read_config(files)


def load_model(
    source: ModelSource,
    device: torch.device,
    dtype: str | torch.dtype,
    config: PreTrainedConfig | None = None,
    ranks: Ranks | None = None,
) -> PreTrainedModel:
    """The model, on ``device``.

    Says what it reads in the log of this module, at level INFO; where that is heard, transformers
    draws its bars, too.

    ``config``: what :func:`look_at_model` has found; None: it is looked at now. ``ranks``: among
    which it is divided, where :func:`check_shardable` has passed it; None: this has all of it.

    A loaded model keeps its own dtype for ``"auto"``; it is moved in place where it must be, and
    otherwise left as it is. A quantised one is neither moved nor converted: from a path its own
    loader puts it on ``device``, with what of it is not packed in its own dtype for ``"auto"``.

    Raises:
        InvalidRequest: that is nothing a model can be named by; or a loaded model that lies on
            several devices, or is quantised and would have to be moved or converted.
        UnsupportedModel: the path or id cannot be read as a causal language model, or does not
            hold the whole of one; says what is missing or left over.
    """
    if isinstance(source, PreTrainedModel):
        return _as_asked(source, device, None if dtype == "auto" else pick_dtype(dtype, device))
    if config is None:
        config = look_at_model(source)
    files = find_files(source)
    wanted = pick_dtype(dtype, device)
    start = time.perf_counter()
    _log.info("reading %s", files.path)
    bars = nullcontext() if _log.isEnabledFor(logging.INFO) else no_bars()
    with _loading(files), bars:
        if says_quantised(config):
            wanted = None if dtype == "auto" else wanted
            model = read_checkpoint(files, config, wanted, device)
        else:
            model = _read_plain(files, config, wanted, device, ranks)
    nn.Module.eval(model)
    _log.info("%s", _described(model, time.perf_counter() - start))
    return model


@contextmanager
def _loading(files: ModelFiles) -> Iterator[None]:
    """UnsupportedModel for whatever is raised: transformers raises nearly anything for a broken
    folder."""
    try:
        yield
    except UnsupportedModel:
        raise
    except Exception as error:
        raise UnsupportedModel(
            f"model {files.path!r} cannot be loaded: {_first_line(error)}"
        ) from error


def _read_plain(
    files: ModelFiles,
    config: PreTrainedConfig,
    dtype: torch.dtype | None,
    device: torch.device,
    ranks: Ranks | None,
) -> PreTrainedModel:
    size = 1 if ranks is None else ranks.size
    model = read_checkpoint(files, config, dtype, device, size)
    as_half = read_as(model.dtype, device)
    if dtype is None and as_half is not model.dtype:
        # Read once more: converted afterwards, what has to stay in float32 would not.
        del model
        model = read_checkpoint(files, config, as_half, device, size)
    if ranks is not None:
        own_part(model, ranks)
    nn.Module.to(model, device)
    return model


def _as_asked(
    model: PreTrainedModel, device: torch.device, dtype: torch.dtype | None
) -> PreTrainedModel:
    """A loaded model on this device and, if one is given, in this dtype. See :func:`load_model`."""
    devices = {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}
    if len(devices) > 1:
        raise InvalidRequest(
            f"a loaded {type(model).__name__} is spread over {', '.join(sorted(devices))} by its "
            "device map; a model has to lie on one device"
        )
    if model.device == device and (dtype is None or model.dtype == dtype):
        return model
    if _is_packed(model):
        raise InvalidRequest(
            f"a loaded {type(model).__name__} is quantised, on {model.device} in {model.dtype}, "
            f"and is not moved or converted to {device}{f' in {dtype}' if dtype else ''}"
        )
    return nn.Module.to(model, device=device, dtype=dtype)


def _is_packed(model: PreTrainedModel) -> bool:
    """Whether weights are quantised still: those of a GGUF file mostly are not once it is read."""
    if not getattr(model, "is_quantized", False):
        return False
    method = getattr(model, "quantization_method", None)
    return method != "gguf" or not all(p.is_floating_point() for p in model.parameters())


def _described(model: PreTrainedModel, seconds: float) -> str:
    count = sum(parameter.numel() for parameter in model.parameters())
    dtype = str(model.dtype).removeprefix("torch.")
    packed = ", quantised" if _is_packed(model) else ""
    return (
        f"{type(model).__name__}, {count:,} parameters, {dtype}{packed}, "
        f"on {model.device}: {seconds:.1f} s"
    )


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies with the model; None where there is none.

    Raises:
        UnsupportedModel: there are tokenizer files, but they cannot be read.
    """
    loaded = isinstance(source, PreTrainedModel)
    name = source.name_or_path if isinstance(source, PreTrainedModel) else os.fspath(source)
    if not name or (loaded and not os.path.isdir(os.path.expanduser(name))):
        return None  # a loaded model without a folder: ask nobody's network for a tokenizer
    try:
        files = find_files(name)
    except UnsupportedModel:
        if loaded:
            return None  # its folder does not say which of several files it was
        raise
    if files.gguf is None and os.path.isdir(files.name) and not _has_tokenizer(Path(files.name)):
        return None
    check_packages(files)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            files.name, **files.options
        )
    except Exception as error:
        raise UnsupportedModel(
            f"tokenizer of {files.path!r} cannot be loaded: {_first_line(error)}"
        ) from error
    return tokenizer


def _check_path(files: ModelFiles) -> None:
    name = files.name
    if not name:
        raise UnsupportedModel("a model's path or hub id is empty")
    if files.gguf is not None:
        return check_packages(files)
    path = Path(name)
    if looks_local(name) and not path.is_dir():
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
