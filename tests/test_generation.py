"""Search parameters from a model's generation config."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from tests.support.tiny_models import tiny_model
from w2s_fast import SearchParams
from w2s_fast.errors import InvalidRequest

SAMPLING: dict[str, Any] = {
    "do_sample": True,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "max_new_tokens": 12,
    "stop_strings": ["###"],
}


@pytest.fixture
def sources(tmp_path: Path) -> list[Any]:
    """The same config in all ways that it may be given."""
    config = GenerationConfig(**SAMPLING)
    config.save_pretrained(tmp_path)
    model = copy.deepcopy(tiny_model("llama"))
    model.generation_config = GenerationConfig(**SAMPLING)
    return [config, SAMPLING, tmp_path, str(tmp_path), model]


def test_what_a_config_sets_is_taken_wherever_it_lies(sources: list[Any]) -> None:
    wanted = SearchParams(temperature=0.6, top_k=20, top_p=0.95, max_new_tokens=12, stop=("###",))
    assert [SearchParams.from_generation_config(source) for source in sources] == [wanted] * 5


def test_what_it_leaves_open_is_as_always_and_the_callers_word_is_last() -> None:
    assert SearchParams.from_generation_config(GenerationConfig()) == SearchParams()
    assert SearchParams.from_generation_config({}) == SearchParams()
    own = {"method": "sample", "temperature": 1.0, "n": 3}
    found = SearchParams.from_generation_config(SAMPLING, **own)
    assert (found.method, found.temperature, found.n, found.top_k) == ("sample", 1.0, 3, 20)


def test_greedy_is_greedy() -> None:
    config = {"do_sample": False, "temperature": 0.6}
    assert SearchParams.from_generation_config(config).temperature == 0.0


def test_what_has_no_counterpart_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="repetition_penalty=1.1, no_repeat_ngram_size=3") as told:
        SearchParams.from_generation_config(
            GenerationConfig(repetition_penalty=1.1, no_repeat_ngram_size=3, typical_p=1.0)
        )
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SearchParams.from_generation_config({"repetition_penalty": 1.0, "guidance_scale": None})


@pytest.mark.parametrize("source", [None, 3, "/no/such/folder", object(), "gpt2"])
def test_what_is_no_config_is_refused(source: Any) -> None:
    with pytest.raises(InvalidRequest, match="allowed: "):
        SearchParams.from_generation_config(source)


def test_what_is_wrong_in_a_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="top_p is 7"):
        SearchParams.from_generation_config({"top_p": 7})
    (tmp_path / "generation_config.json").write_text(json.dumps([1]))
    with pytest.raises(InvalidRequest, match="holds no object"):
        SearchParams.from_generation_config(tmp_path)
