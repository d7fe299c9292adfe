"""Model folders on disk, for tests that load by path."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_models import (
    BYTE_VOCABULARY,
    save_tiny,
)
from w2s_fast import Engine, Guide


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Base, tuned and untuned models with their tokenizers, as folders; logits are padded."""
    root = tmp_path_factory.mktemp("models")
    return {
        "base": save_tiny(root / "base", "llama", seed=0, vocab_size=270, peak=1.0),
        "tuned": save_tiny(root / "tuned", "gpt2", seed=1, vocab_size=264),
        "untuned": save_tiny(root / "untuned", "gpt2", seed=2, vocab_size=BYTE_VOCABULARY),
    }


@pytest.fixture(scope="module")
def path_engine(folders: dict[str, Path]) -> Engine:
    return Engine(
        base=str(folders["base"]),
        guides=Guide(tuned=str(folders["tuned"]), untuned=folders["untuned"]),
        device="cpu",
        kv_cache_tokens=4096,
    )
