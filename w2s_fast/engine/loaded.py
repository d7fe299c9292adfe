"""Loaded: the models and adapters of an engine, each read once, whoever names it."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import PreTrainedModel

from w2s_fast.errors import UnsupportedModel
from w2s_fast.models import Adapter, ModelSource, find_adapter, load_model, read_adapter


class Loaded:
    """Models by what names them, and adapters by their model."""

    def __init__(self, device: torch.device, dtype: str | torch.dtype) -> None:
        self._device = device
        self._dtype = dtype
        self._models: dict[Any, PreTrainedModel] = {}
        self._adapters: dict[tuple[Any, Any], Adapter] = {}

    def of(
        self, source: ModelSource, beside: ModelSource | None = None
    ) -> tuple[PreTrainedModel, Adapter | None]:
        """A model, and the adapter that is added to it; None: there is none.

        Args:
            beside: an untuned model, for which an adapter is; not given, or an adapter itself:
                each is for the model that its config names.

        Raises:
            UnsupportedModel: the model or the adapter cannot be loaded.
        """
        model_source = weights_of(source, beside)
        key = key_of(model_source)
        if key not in self._models:
            self._models[key] = load_model(model_source, self._device, self._dtype)
        model, files = self._models[key], find_adapter(source)
        if files is None:
            return model, None
        both = (key, key_of(source))
        if both not in self._adapters:
            self._adapters[both] = read_adapter(files, model)
        return model, self._adapters[both]


def weights_of(source: ModelSource, beside: ModelSource | None = None) -> ModelSource:
    """What names the weights: ``source``, or the model that an adapter is for.

    Raises:
        UnsupportedModel: nobody says which that is.
    """
    files = find_adapter(source)
    if files is None:
        return source
    if beside is not None and find_adapter(beside) is None:
        return beside
    if files.model is None:
        raise UnsupportedModel(
            f"adapter {files.name!r} does not say which model it is for "
            "(base_model_name_or_path): name it as untuned"
        )
    return files.model


def key_of(source: ModelSource) -> Any:
    """Equal for what is the same model, however its path is written."""
    if isinstance(source, PreTrainedModel):
        return id(source)
    name = os.path.expanduser(str(source))
    return os.path.realpath(name) if os.path.exists(name) else name
