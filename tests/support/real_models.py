"""The real models that ``w2s-fast fetch-models`` has fetched; tests of others are skipped."""

from __future__ import annotations

from pathlib import Path

import pytest

from w2s_fast.real import REAL_MODELS, is_fetched, real_model_path


def fetched(name: str) -> Path:
    """A model's folder; where it was not fetched, the test is skipped."""
    if not is_fetched(REAL_MODELS[name]):
        pytest.skip(f"{name} is not there: w2s-fast fetch-models {name}")
    return real_model_path(name)
