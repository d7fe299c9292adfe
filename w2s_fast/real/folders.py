"""Where fetched models lie: a folder each, in the user's cache."""

from __future__ import annotations

import os
from pathlib import Path

from w2s_fast.errors import InvalidRequest
from w2s_fast.real.catalogue import REAL_MODELS, RealModel


def models_home() -> Path:
    """``w2s-fast/models`` in ``XDG_CACHE_HOME``, or in ``~/.cache``; it need not exist."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "w2s-fast" / "models"


def folder_of(model: RealModel) -> Path:
    """Its folder, which is there, and whole, as soon as it is fetched."""
    return models_home() / model.name


def is_fetched(model: RealModel) -> bool:
    """Whether its folder is there."""
    return folder_of(model).is_dir()


def real_model_path(name: str) -> Path:
    """The folder of a fetched model.

    Raises:
        InvalidRequest: there is no such model, or it has not been fetched; says how to.
    """
    if name not in REAL_MODELS:
        raise InvalidRequest(f"no real model {name!r}; allowed: {', '.join(REAL_MODELS)}")
    folder = folder_of(REAL_MODELS[name])
    if not folder.is_dir():
        raise InvalidRequest(f"{name} is not there yet: w2s-fast fetch-models {name}")
    return folder
