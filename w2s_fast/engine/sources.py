"""What names mean: whose weights, and whether two of them are the same."""

from __future__ import annotations

import os
from typing import Any

from transformers import PreTrainedModel

from w2s_fast.errors import UnsupportedModel
from w2s_fast.models import AdapterFiles, ModelSource, check_adapter, find_adapter


def resolve(
    source: ModelSource, beside: ModelSource | None = None
) -> tuple[ModelSource, AdapterFiles | None]:
    """What names the weights: ``source``, or the model that an adapter is for; and that adapter.

    Args:
        beside: an untuned model, for which an adapter is; not given, or an adapter itself: it is
            for the model that its config names.

    Raises:
        UnsupportedModel: nobody says which model that is, or the adapter can be refused already.
    """
    adapter = find_adapter(source)
    if adapter is None:
        return source, None
    check_adapter(adapter)
    if beside is not None and find_adapter(beside) is None:
        return beside, adapter
    if adapter.model is None:
        raise UnsupportedModel(
            f"adapter {adapter.name!r} does not say which model it is for "
            "(base_model_name_or_path): name it as untuned"
        )
    return adapter.model, adapter


def key_of(source: ModelSource) -> Any:
    """Equal for what is the same model, however its path is written."""
    if isinstance(source, PreTrainedModel):
        return id(source)
    name = os.path.expanduser(str(source))
    return os.path.realpath(name) if os.path.exists(name) else name
