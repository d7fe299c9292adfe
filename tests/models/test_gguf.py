"""A GGUF file is a model and its tokenizer, the same as a folder with those weights."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.gguf_files import (
    BOS,
    EOS,
    VOCABULARY,
    gguf_llama,
    merging_tokenizer,
    needs_gguf,
    rounded_to_blocks,
    write_gguf,
)
from tests.support.tiny_models import BYTE_VOCABULARY, save_tiny, tiny_model
from w2s_fast import Engine, Guide, SearchParams
from w2s_fast.errors import UnsupportedModel
from w2s_fast.models.load import load_model, load_tokenizer

CPU = torch.device("cpu")
TEXT = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def save(folder: Path, seed: int) -> Path:
    gguf_llama(seed).save_pretrained(folder)
    merging_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("models") / "tiny.gguf", gguf_llama())


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """A file that nobody can read as a model."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    return tmp_path


def test_a_file_holds_what_was_written(file: Path) -> None:
    model = load_model(file, CPU, "auto")
    assert model.dtype is torch.float32 and not model.training
    for name, weight in gguf_llama().state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    with torch.inference_mode():
        assert torch.allclose(model(TEXT).logits, gguf_llama()(TEXT).logits, atol=1e-5)


def test_a_file_holds_its_tokenizer(file: Path) -> None:
    tokenizer, expected = load_tokenizer(file), merging_tokenizer()
    assert tokenizer is not None
    for text in ("The film, the thief", "naïve 東京 🎬", " a\n\nb"):
        assert tokenizer(text)["input_ids"] == expected(text)["input_ids"]
        assert tokenizer.decode(expected(text)["input_ids"], skip_special_tokens=True) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (BOS, EOS)


def test_packed_weights_are_unpacked(tmp_path: Path) -> None:
    """Blocks are 32 numbers wide."""
    model = tiny_model("llama", vocab_size=VOCABULARY, dtype=torch.float32, bos=BOS)
    wide = type(model)(
        model.config.__class__(**{**model.config.to_dict(), "hidden_size": 32, "head_dim": 8})
    )
    file = write_gguf(tmp_path / "packed.gguf", wide, packed=True)
    loaded = load_model(file, CPU, "auto")
    name = "model.layers.0.mlp.up_proj.weight"
    own = wide.state_dict()[name]
    assert not torch.equal(loaded.state_dict()[name], own)
    assert torch.allclose(loaded.state_dict()[name], rounded_to_blocks(own), atol=1e-6)
    assert load_model(file, CPU, "float16").dtype is torch.float16
    assert load_model(loaded, CPU, "bfloat16").dtype is torch.bfloat16  # no longer packed


def test_a_search_over_files_is_that_over_folders(tmp_path: Path) -> None:
    folders = [save(tmp_path / str(seed), seed) for seed in range(3)]
    files = [write_gguf(tmp_path / f"{seed}.gguf", gguf_llama(seed)) for seed in range(3)]
    params = SearchParams(beam_width=2, successors=2, chunk_length=3, max_new_tokens=9)
    (one,), (other,) = (
        Engine(base, Guide(tuned, untuned), kv_cache_tokens=1024).generate(["The film"], params)
        for base, tuned, untuned in (folders, files)
    )
    assert one.token_ids == other.token_ids and one.text == other.text
    assert one.score == pytest.approx(other.score, abs=1e-4)


def test_a_folder_may_hold_one_file(file: Path, tmp_path: Path) -> None:
    shutil.copy(file, tmp_path / "model.gguf")
    (tmp_path / "README.md").write_text("words")
    assert load_model(tmp_path, CPU, "auto").config.vocab_size == VOCABULARY
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    for source in (str(tmp_path), loaded):
        tokenizer = load_tokenizer(source)
        assert tokenizer is not None and tokenizer.eos_token_id == EOS


def test_of_several_files_one_has_to_be_named(empty: Path) -> None:
    (empty / "another.gguf").touch()
    with pytest.raises(UnsupportedModel, match=r"several GGUF files.*: another\.gguf, model\.gguf"):
        Engine(base=empty)
    with pytest.raises(UnsupportedModel, match=r"several GGUF files"):
        load_tokenizer(str(empty))


def test_other_weights_go_before_files(empty: Path) -> None:
    save_tiny(empty)
    (empty / "another.gguf").touch()
    assert load_model(empty, CPU, "auto").config.vocab_size == BYTE_VOCABULARY


@pytest.mark.parametrize("name", ["no.gguf", "/no/such/no.gguf", "~/no.gguf"])
def test_a_file_that_is_none_is_named(name: str) -> None:
    with pytest.raises(UnsupportedModel, match=r"no\.gguf': there is no such file"):
        load_model(name, CPU, "auto")


def test_a_broken_file_is_named(empty: Path) -> None:
    needs_gguf()
    with pytest.raises(UnsupportedModel, match=r"model\.gguf' cannot be loaded: "):
        load_model(empty, CPU, "auto")


def test_an_older_transformers_is_refused(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", "5.22.2")
    with pytest.raises(UnsupportedModel, match=r"need transformers 5\.23 or later, .* 5\.22\.2"):
        load_tokenizer(empty / "model.gguf")


@pytest.mark.parametrize("lacks", [["gguf"], ["gguf", "accelerate"]])
def test_missing_packages_are_named(
    lacks: list[str], empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(name: str) -> Any:
        return None if name in lacks else importlib.util.find_spec("json")

    monkeypatch.setattr("transformers.__version__", "5.23.0")
    monkeypatch.setattr("w2s_fast.models.files.find_spec", find)
    for load in (lambda: load_model(empty, CPU, "auto"), lambda: load_tokenizer(str(empty))):
        with pytest.raises(UnsupportedModel, match=rf"pip install {' '.join(lacks)}$"):
            load()
