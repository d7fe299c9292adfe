"""Cards of what is trained here: the part that says how it was made, and what was measured."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch


def recipe_and_numbers(
    settings: Mapping[str, Any], measured: Mapping[str, float], packages: tuple[str, ...]
) -> list[str]:
    """The last lines of a card. ``packages``: of which versions count, beside torch's."""
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return [
        "## Recipe",
        "",
        *(f"- {key}: {value}" for key, value in settings.items()),
        "",
        "## Measured",
        "",
        *(
            f"- {key}: {value:,.0f}" if value == int(value) else f"- {key}: {value:.3f}"
            for key, value in measured.items()
        ),
        f"- with torch {torch.__version__}, {versions}, threads: {torch.get_num_threads()}, "
        f"{platform.machine()}",
        "",
    ]
