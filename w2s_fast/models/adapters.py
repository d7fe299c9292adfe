"""Adapters: LoRA folders of PEFT's, applied beside the weights of a model that stays as it is.

PEFT reads the folder and says what it changes: its own layers are put around twins of the model's
modules, which share its weights. From them come the deltas that our passes add, and the model that
those passes are compared with when an engine is made. So one model in memory is the untuned one
and, with each of its adapters, a tuned one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils.peft_utils import find_adapter_config_file

from w2s_fast.errors import UnsupportedModel, some_of
from w2s_fast.models.deltas import Delta, LowRank, Replaced
from w2s_fast.models.files import find_files, looks_local
from w2s_fast.models.view import ModelView

_CONFIG = "adapter_config.json"
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
_OWN_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_NAME = "default"
# Ways to begin training that leave the model's weights as they are. Others train against weights
# that they have changed, which nobody has here; PEFT can save such an adapter as a plain one.
_PLAIN_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")


class AdapterFiles(NamedTuple):
    """An adapter without the model that it is for.

    Attributes:
        name: its folder or hub id.
        model: the model that its config names, by path or hub id; None: it names none.
    """

    name: str
    model: str | None


def find_adapter(source: Any) -> AdapterFiles | None:
    """The adapter that a path or hub id names; None: it names something else.

    Raises:
        UnsupportedModel: adapter and model lie in one folder, the config cannot be read, or it is
            not clear which file is named: see :func:`find_files`.
    """
    if not isinstance(source, (str, os.PathLike)) or not os.fspath(source):
        return None
    where = find_files(source)
    name = where.name
    if where.gguf is not None or (looks_local(name) and not os.path.isdir(name)):
        return None  # the loading says what is wrong
    path = find_adapter_config_file(name)
    if path is None:
        return None
    folder = Path(path).parent
    others = [p.name for kind in _WEIGHTS for p in folder.glob(kind) if p.name not in _OWN_WEIGHTS]
    if others:
        raise UnsupportedModel(
            f"model {name!r} holds an adapter ({_CONFIG}) beside a model ({sorted(others)[0]}): "
            "give each a folder of its own"
        )
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
        model = config.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise UnsupportedModel(f"adapter {name!r}: {_CONFIG} cannot be read: {error}") from error
    return AdapterFiles(name, model or None)


@dataclass
class Adapter:
    """An adapter read for a model.

    Attributes:
        name: its folder or hub id.
        deltas: what it makes of modules, by the id of the model's own module, each with its name.
        head: what takes the place of the model's LM head; None: that stays.
        reference: the model as PEFT runs it, with eager attention.
    """

    name: str
    deltas: dict[int, tuple[str, Delta]]
    head: nn.Module | None
    reference: PreTrainedModel

    def delta_of(self, module: nn.Module) -> Delta | None:
        """Of one of the model's own modules."""
        found = self.deltas.get(id(module))
        return None if found is None else found[1]

    def follow(self) -> None:
        """The model's weights may have other values now."""
        for _, delta in self.deltas.values():
            if isinstance(delta, LowRank):
                delta.follow()


def check_adapter(files: AdapterFiles) -> None:
    """What can be refused by its config. UnsupportedModel: it is, or PEFT is not installed."""
    _read_config(files)


def read_adapter(files: AdapterFiles, model: PreTrainedModel) -> Adapter:
    """Read an adapter for a model, which is left as it is.

    Raises:
        UnsupportedModel: it is none of LoRA's, is for another model, or changes what cannot be
            changed beside the model's weights; says what.
    """
    config = _read_config(files)
    if config.bias != "none" and any(
        name.endswith(".bias") for name, _ in model.named_parameters()
    ):
        raise _refuse(files, f"it has biases of the model itself (bias={config.bias!r})")
    view: Any = ModelView(model, "eager").model
    try:
        injected, missing, left = _inject(files, config, view, model)
    except Exception as error:  # PEFT raises nearly anything for what does not fit
        why = f"PEFT cannot put it beside {_described(model)}: {_told(error)}"
        raise _refuse(files, why) from error
    if missing:
        raise _refuse(files, f"it lacks weights that its config speaks of: {some_of(missing)}")
    if left:
        where = _described(model)
        raise _refuse(files, f"it has weights for which {where} has no place: {some_of(left)}")
    reference: Any = injected.base_model.model
    reference.eval()
    deltas = dict(_deltas(files, model, reference))
    return Adapter(files.name, deltas, _head(model, deltas, reference), reference)


def _read_config(files: AdapterFiles) -> Any:
    if importlib.util.find_spec("peft") is None:
        raise UnsupportedModel(
            f"adapter {files.name!r}: adapters are read by PEFT, which is not installed: "
            "pip install peft"
        )
    import peft

    try:
        config = peft.PeftConfig.from_pretrained(files.name)
    except Exception as error:
        raise _refuse(files, f"PEFT cannot read its config: {_told(error)}") from error
    if not isinstance(config, peft.LoraConfig):
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        raise _refuse(files, f"it is of the kind {kind}; allowed: LORA")
    task = getattr(config.task_type, "value", config.task_type)
    if task not in (None, "CAUSAL_LM"):
        raise _refuse(files, f"it is for the task {task}; allowed: CAUSAL_LM")
    if config.init_lora_weights not in _PLAIN_BEGINNINGS:
        raise _refuse(
            files,
            f"its training began with init_lora_weights={config.init_lora_weights!r}, which "
            "changes the model's weights: save it once more as a plain adapter "
            "(path_initial_model_for_weight_conversion of PEFT's save_pretrained)",
        )
    if config.layer_replication:
        raise _refuse(files, "it has layers twice (layer_replication)")
    config.inference_mode = True
    config.init_lora_weights = True
    return config


def _inject(
    files: AdapterFiles, config: Any, view: Any, model: PreTrainedModel
) -> tuple[Any, list[str], list[str]]:
    """PEFT's layers around the modules of a view; which weights were missing, which left over."""
    import peft
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    with _as_it_was(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights, which nobody merges here
        injected = peft.PeftModel(view, config, _NAME, autocast_adapter_dtype=False)
        weights = load_peft_weights(files.name, device=str(model.device))
        _drop_the_models_own(weights, injected, model)
        found: Any = set_peft_model_state_dict(injected, weights, _NAME)
    named = dict(injected.named_parameters(remove_duplicate=False))
    read = {id(parameter) for name, parameter in named.items() if name not in found.missing_keys}
    missing = [
        key
        for key in found.missing_keys
        if _NAME in key.split(".") and id(named.get(key)) not in read  # tied ones are saved once
    ]
    return injected, missing, list(found.unexpected_keys)


def _drop_the_models_own(
    weights: dict[str, Tensor], injected: nn.Module, model: PreTrainedModel
) -> None:
    """Beside an adapter of embeddings PEFT saves the model's own: they are not to be written."""
    own = {id(parameter) for parameter in model.parameters()}
    for name, parameter in injected.named_parameters(remove_duplicate=False):
        if id(parameter) not in own or (saved := weights.pop(name, None)) is None:
            continue
        if saved.shape != parameter.shape:
            shapes = f"{list(saved.shape)}, not {list(parameter.shape)}"
            raise ValueError(f"{name} has another shape, as for added tokens: {shapes}")
        if not torch.allclose(saved.to(parameter), parameter, rtol=1e-3, atol=1e-5):
            raise ValueError(f"{name} has other values than the model's")


@contextmanager
def _as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """The model's weights have their values, and take gradients, as before; and the caller's
    generators have drawn nothing."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    versions = _versions(model)
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    if _versions(model) != versions:
        raise RuntimeError("it has written to the model's own weights; read the model anew")


def _versions(model: PreTrainedModel) -> list[int]:
    return [p._version for p in model.parameters() if not p.is_inference()]


def _deltas(
    files: AdapterFiles, model: PreTrainedModel, reference: nn.Module
) -> Iterator[tuple[int, tuple[str, Delta]]]:
    """What PEFT has put in the place of modules: by the ids of those, with their names."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    within: tuple[str, ...] = ()
    for name, module in reference.named_modules():
        if name.startswith(within) and within:
            continue
        if not isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            continue
        within = (*within, name + ".")
        original = model.get_submodule(name)
        delta = _delta(cast(nn.Module, module), original)
        if delta is None or "forward" in vars(original):
            own = " that has a forward of its own" * ("forward" in vars(original))
            variant = getattr(module, "lora_variant", {}).get(_NAME)
            kind = type(module if variant is None else variant).__name__
            kind = f"{kind} for a {type(original).__name__}{own}"
            raise _refuse(files, f"{name} cannot be changed beside the model's weights: {kind}")
        yield id(original), (name, delta)


def _delta(module: nn.Module, original: nn.Module) -> Delta | None:
    """What a layer of PEFT's is to us; None: nothing that we have."""
    from peft.tuners.lora import Embedding, LoraLayer
    from peft.tuners.lora.variants import DoraEmbeddingVariant, DoraLinearVariant
    from peft.utils.other import AuxiliaryTrainingWrapper

    layer: Any = module
    if any(True for _ in original.children()):
        return None
    if isinstance(module, AuxiliaryTrainingWrapper):
        saved = getattr(layer, "modules_to_save", {})
        return Replaced(dict(saved.items()).get(_NAME, module))
    if not isinstance(module, LoraLayer):
        return None
    variant: Any = layer.lora_variant.get(_NAME)
    if isinstance(module, Embedding):
        known = variant is None or isinstance(variant, DoraEmbeddingVariant)
        return Replaced(layer) if known else None
    down, up = dict(layer.lora_A.items()).get(_NAME), dict(layer.lora_B.items()).get(_NAME)
    if not (isinstance(down, nn.Linear) and isinstance(up, nn.Linear)):
        return None
    dora = isinstance(variant, DoraLinearVariant)
    linear = isinstance(original, Conv1D) or hasattr(original, "in_features")  # quantised ones, too
    if not linear or not (variant is None or dora):
        return None
    return LowRank(
        down=down.weight.detach(),
        up=up.weight.detach(),
        scale=float(layer.scaling[_NAME]),
        bias=None if up.bias is None else up.bias.detach(),
        magnitude=layer.lora_magnitude_vector[_NAME].weight.detach() if dora else None,
        module=original,
        weight=lambda: _weight_of(original),
    )


def _weight_of(module: nn.Module) -> Tensor:
    """[V, D] as numbers, also of a quantised module."""
    from peft.utils.integrations import dequantize_module_weight

    weight: Tensor = dequantize_module_weight(module)
    return weight.T if isinstance(module, Conv1D) else weight


def _head(
    model: PreTrainedModel, deltas: dict[int, tuple[str, Delta]], reference: Any
) -> nn.Module | None:
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    found = deltas.get(id(head))
    if found is None:
        return None
    name, delta = found
    module: nn.Module = (
        delta.module if isinstance(delta, Replaced) else reference.get_submodule(name)
    )
    return module


def _described(model: PreTrainedModel) -> str:
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"{type(model).__name__} of {count:,} parameters"


def _refuse(files: AdapterFiles, why: str) -> UnsupportedModel:
    return UnsupportedModel(f"adapter {files.name!r}: {why}")


def _told(error: Exception) -> str:
    """The first two lines: behind a headline PEFT says which weights it means."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    return " ".join(lines[:2]) or type(error).__name__
