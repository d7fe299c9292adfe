"""What a folder holds is loaded whole, or refused with the names of what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tests.support.tiny_models import tiny_model
from w2s_fast import Engine
from w2s_fast.errors import UnsupportedModel
from w2s_fast.models.load import load_model

CPU = torch.device("cpu")


def saved(folder: Path, family: str, **changed: Tensor | None) -> Path:
    """The model in a folder; weights of these names changed, added, or left out where None."""
    model = tiny_model(family, dtype=torch.float32)
    weights = {**model.state_dict(), **{k.replace("__", "."): v for k, v in changed.items()}}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    kept = {k: v.clone() for k, v in weights.items() if v is not None}
    model.save_pretrained(folder, state_dict=kept)
    return folder


def load(folder: Path) -> PreTrainedModel:
    return load_model(folder, CPU, "auto")


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_whole_models_load_with_tied_and_untied_heads(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, dtype=torch.float32)
    loaded = load(saved(tmp_path, family)).state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded[name], weight), name


def test_a_tied_head_need_not_be_saved(tmp_path: Path) -> None:
    model = tiny_model("gpt2", dtype=torch.float32)
    model.base_model.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path).lm_head.weight, model.lm_head.weight)


def test_constants_that_older_versions_saved_are_left_out(tmp_path: Path) -> None:
    extra = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4),
        "transformer.h.1.attn.masked_bias": torch.tensor(-1e4),
    }
    load(saved(tmp_path, "gpt2", **extra))


def test_a_model_that_was_saved_without_its_head_is_refused(tmp_path: Path) -> None:
    tiny_model("llama", dtype=torch.float32).base_model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"lacks weights of LlamaForCausalLM: lm_head\.weig"):
        Engine(base=tmp_path)


LARGE = """
import re, sys, torch
from pathlib import Path
from w2s_fast.models.load import load_model

def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10

small, large = sys.argv[1:]
load_model(small, torch.device("cpu"), "auto")  # what the first one needs besides weights
before = peak()
model = load_model(large, torch.device("cpu"), "auto")
for weight in model.parameters():
    weight.sum()
weights, grown = sum(weight.nbytes for weight in model.parameters()), peak() - before
assert weights > 100 << 20, weights
assert weights / 2 < grown < 1.3 * weights, (weights, grown)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's peak memory")
def test_weights_take_their_memory_once(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    tiny_model("llama", dtype=torch.float32).save_pretrained(small)
    config = LlamaConfig(
        vocab_size=64, hidden_size=1024, intermediate_size=4096, num_hidden_layers=2,
        num_attention_heads=8,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(large)
    subprocess.run([sys.executable, "-c", LARGE, small, large], check=True)


WRONG: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "missing": (
        {"model.layers.1.mlp.up_proj.weight": None},
        r"lacks weights .*: model\.layers\.1\.mlp\.up_proj\.weight;",
    ),
    "left over": (
        {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 16)},
        r"would leave out: model\.layers\.0\.self_attn\.q_proj\.lora_A\.weight$",
    ),
    "another layer": (
        {f"model.layers.2.part{i}.weight": torch.zeros(2) for i in range(9)},
        r"model\.layers\.2\.part4\.weight and 4 more$",
    ),
    "another shape": (
        {"model.norm.weight": torch.zeros(3)},
        r"other shapes than its config says: model\.norm\.weight \(3, not 16\)$",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_weights_are_refused_with_their_names(kind: str, tmp_path: Path) -> None:
    weights, message = WRONG[kind]
    with pytest.raises(UnsupportedModel, match=message):
        load(saved(tmp_path, "llama", **weights))


def test_weights_may_lie_in_several_files(tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    loaded = load(tmp_path).state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded[name], weight), name
    shards[1].unlink()
    with pytest.raises(UnsupportedModel, match=rf"cannot be loaded: .*{shards[1].name}"):
        load(tmp_path)


def test_a_config_of_old_names_its_dtype_by_another_word(tmp_path: Path) -> None:
    """Where ``"auto"`` keeps the checkpoint's, as it does for a device that is no CPU."""
    tiny_model("llama", dtype=torch.float32).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["dtype"]
    path.write_text(json.dumps({**config, "torch_dtype": "float16"}))
    assert load_model(tmp_path, torch.device("meta"), "auto").dtype is torch.float16
    assert load(tmp_path).dtype is torch.float32


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "base_model_name_or_path": "somewhere", "r": 4}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=r"is an adapter .*merge_and_unload"):
        load(tmp_path)


def test_a_path_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    saved(tmp_path / "models", "llama")
    assert load(Path("~/models")).config.model_type == "llama"
