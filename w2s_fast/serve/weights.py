"""Whose weights may be read by a server: files of numbers, and no files of code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from w2s_fast.errors import InvalidRequest
from w2s_fast.models import find_files


def check_weights(named: Mapping[str, str]) -> None:
    """Whether all weights are safetensors or GGUF; of a hub id that cannot be looked at, the
    loading says so.

    Args:
        named: paths or hub ids, by what errors call the model.

    Raises:
        InvalidRequest: a model's weights are pickles, which may hold code.
    """
    for role, source in named.items():
        where = find_files(source)
        folder = Path(where.name)
        if folder.is_dir():
            names = [path.name for path in folder.iterdir()]
        else:
            names = _names_on_the_hub(where.name)
        safe = any(name.endswith((".safetensors", ".gguf")) for name in names)
        if names and not safe and any(name.endswith((".bin", ".pt", ".pth")) for name in names):
            raise InvalidRequest(
                f"{role} ({source}) has its weights as pickles, which may hold code; allowed: "
                "safetensors, GGUF, or --allow-pickles"
            )


def _names_on_the_hub(name: str) -> list[str]:
    from huggingface_hub import HfApi

    try:
        return HfApi().list_repo_files(name)
    except Exception:  # no answer, or no such model
        return []
