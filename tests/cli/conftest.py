"""Models for the command."""

from __future__ import annotations

import pytest

from tests.support.tiny_models import save_tiny
from w2s_fast.demo import DemoModels


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> DemoModels:
    folder = tmp_path_factory.mktemp("models")
    names = ("base", "tuned", "untuned")
    return DemoModels(*(save_tiny(folder / name, seed=i) for i, name in enumerate(names)))
