"""What configs and tokenizers say is wrong is said before any weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_models import BYTE_VOCABULARY, byte_tokenizer, save_tiny
from w2s_fast import Engine, Guide
from w2s_fast.errors import InvalidRequest, MismatchedVocabulary, UnsupportedModel

NO_WEIGHTS = "no weights here"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose loading fails as soon as it comes to that."""
    folder = save_tiny(tmp_path_factory.mktemp("models") / "base")
    (folder / "model.safetensors").write_text(NO_WEIGHTS)
    return folder


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "guide", seed=1)


def refused(base: Path, *guides: Guide, **options: Any) -> str:
    with pytest.raises((UnsupportedModel, InvalidRequest)) as error:
        Engine(base, guides or None, device="cpu", kv_cache_tokens=512, **options)
    return f"{type(error.value).__name__}: {error.value}"


def test_weights_are_read_last(base: Path, guide: Path) -> None:
    """So that the tests below do not pass because nothing of the base is read at all."""
    assert f"UnsupportedModel: model {str(base)!r}" in refused(base, Guide(guide, guide))


def test_guides_whose_models_do_not_go_together(base: Path, guide: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", tokenizer=byte_tokenizer(eos="</s>"))
    told = refused(base, Guide(guide, other))
    assert told.startswith(MismatchedVocabulary.__name__) and f"untuned ({other})" in told


def test_guides_with_fewer_logits_than_tokens(base: Path, tmp_path: Path) -> None:
    small = save_tiny(tmp_path / "small", vocab_size=BYTE_VOCABULARY - 8, eos=(), bos=None)
    told = refused(base, Guide(small, None))
    assert told.startswith("MismatchedVocabulary") and "logits for 250 tokens" in told


def test_models_and_tokenizers_that_are_none(base: Path, guide: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert "there is no such folder" in refused(base, Guide(guide, missing))
    broken = save_tiny(tmp_path / "broken", seed=2)
    (broken / "tokenizer.json").write_text("{")
    assert f"tokenizer of {str(broken)!r}" in refused(base, Guide(broken, None))


def test_templates_without_a_place_for_the_prompt(base: Path, guide: Path) -> None:
    assert "prompt_template of base" in refused(base, prompt_template="Q:")
    template = (None, "Q:")
    assert "untuned" in refused(base, Guide(guide, guide, prompt_template=template))
