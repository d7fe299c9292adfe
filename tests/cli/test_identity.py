"""A model is told from others by its files' contents, by few of their bytes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests.support.adapters import save_adapter
from tests.support.tiny_models import save_tiny
from w2s_fast.cli.identity import model_identity
from w2s_fast.cli.models import made_by, name_models
from w2s_fast.errors import UnsupportedModel

PARTS = {"weights", "config", "tokenizer"}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def copied(original: Path, tmp_path: Path) -> Path:
    """Elsewhere, under another name, and younger; the files are copied, the modes are not."""
    folder = tmp_path / "another name"
    shutil.copytree(original, folder, copy_function=shutil.copyfile)
    (folder / "README.md").write_text("a copy")
    (folder / "trainer_state.json").write_text("{}")
    return folder


def differing(one: Path, other: Path) -> set[str]:
    found, others = model_identity(str(one)), model_identity(str(other))
    assert set(found) == set(others) == PARTS
    return {part for part in PARTS if found[part] != others[part]}


def test_a_copied_folder_is_the_same_model(original: Path, copied: Path) -> None:
    assert differing(original, copied) == set()
    assert model_identity(f"{copied}/") == model_identity(str(copied))


def test_a_model_of_the_same_shape_has_other_weights(original: Path, tmp_path: Path) -> None:
    assert differing(original, save_tiny(tmp_path, seed=1)) == {"weights"}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("config.json", "config"),
        ("generation_config.json", "config"),
        ("tokenizer.json", "tokenizer"),
        ("tokenizer_config.json", "tokenizer"),
        ("chat_template.jinja", "tokenizer"),
        ("additional_chat_templates/tools.jinja", "tokenizer"),
        ("merges.txt", "tokenizer"),
        ("spiece.model", "tokenizer"),
    ],
)
def test_a_change_of_any_file_that_decides_is_seen_and_named(
    original: Path, copied: Path, name: str, part: str
) -> None:
    path = copied / name
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.write(" ")
    assert differing(original, copied) == {part}


def save_weights(folder: Path, **tensors: torch.Tensor) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_a_change_of_one_tensor_among_many_is_seen(tmp_path: Path) -> None:
    tensors = {f"layers.{i}": torch.full((50, 100), float(i)) for i in range(200)}
    one = save_weights(tmp_path / "one", **tensors)
    for i in (0, 77, 199):
        changed = {**tensors, f"layers.{i}": tensors[f"layers.{i}"] + 1}
        assert differing(one, save_weights(tmp_path / "other", **changed)) == {"weights"}
    renamed = {("x" if name == "layers.7" else name): value for name, value in tensors.items()}
    assert differing(one, save_weights(tmp_path / "other", **renamed)) == {"weights"}


def test_of_large_files_only_samples_are_read(tmp_path: Path) -> None:
    """A tensor of 40 GB, and as much that says nothing of tensors; the disk holds none of it."""
    size = 40 << 30
    header = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    (tmp_path / "one").mkdir()
    path = tmp_path / "one" / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + size)
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "pytorch_model.bin"
    other.touch()
    os.truncate(other, size)
    before = [model_identity(str(tmp_path / name))["weights"] for name in ("one", "other")]
    for file in (path, other):
        with file.open("r+b") as opened:
            opened.seek(-100, os.SEEK_END)
            opened.write(b"x")
    after = [model_identity(str(tmp_path / name))["weights"] for name in ("one", "other")]
    assert len({*before, *after}) == 4


def test_a_gguf_file_is_its_content_in_a_folder_of_its_own_or_not(tmp_path: Path) -> None:
    """Its first part is read whole: a chat template may change by a letter."""
    size = 200 << 20
    one, other = tmp_path / "one.gguf", tmp_path / "folder" / "other.gguf"
    other.parent.mkdir()
    for path in (one, other):
        path.write_bytes(b"GGUF")
        os.truncate(path, size)
    found = model_identity(str(one))
    assert set(found) == {"file"}
    assert model_identity(str(other)) == model_identity(str(other.parent)) == found
    for offset in (60_000_001, -100):
        with other.open("r+b") as file:
            file.seek(offset, os.SEEK_SET if offset > 0 else os.SEEK_END)
            file.write(b"x")
        assert model_identity(str(other)) != found
        found = model_identity(str(other))


def test_a_gguf_file_that_is_none_or_one_of_several_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="no such file"):
        model_identity(str(tmp_path / "no.gguf"))
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(UnsupportedModel, match=r"a\.gguf, b\.gguf"):
        model_identity(str(tmp_path))


@pytest.mark.parametrize(
    "data", [b"", b"x", b"\xff" * 99, b"\2\0\0\0\0\0\0\0[]", b"\1" + b"\0" * 99]
)
def test_what_is_no_weights_is_left_to_the_loading(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    before = model_identity(str(tmp_path))
    assert set(before) == PARTS
    (tmp_path / "model.safetensors").write_bytes(data + b"y")
    assert model_identity(str(tmp_path))["weights"] != before["weights"]


def test_a_hub_id_is_the_commit_that_lies_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--somebody--something"
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit / "config.json").write_text("{}")
    assert model_identity("somebody/something") == {"commit": commit}
    with pytest.raises(UnsupportedModel, match="neither a folder nor in the cache"):
        model_identity("somebody/else")
    assert model_identity("/no/such/folder") == {"commit": "unknown"}


def test_an_adapter_is_its_own_files_and_those_of_its_model(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = save_tiny(tmp_path / "model", layers=1)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    adapter = save_adapter(loaded, tmp_path / "adapter", target_modules=["q_proj"])
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_model_name_or_path": str(model)}))

    def found(untuned: str) -> dict[str, str]:
        named = name_models(str(model), [str(adapter)], [untuned], [])
        return made_by(named, "cpu", "auto")

    beside, alone = found(str(model)), found("none")
    own = model_identity(str(adapter))
    assert {f"tuned {part}": value for part, value in own.items()}.items() <= beside.items()
    assert set(alone) - set(beside) == {f"tuned adapter's model {part}" for part in PARTS}
    assert alone["tuned adapter's model weights"] == beside["untuned weights"]
