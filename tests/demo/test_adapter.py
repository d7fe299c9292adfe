"""The bundled adapter, what it was trained on, and the script that makes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.progress import Progress
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from tests.support.tiny_models import save_tiny
from w2s_fast.demo import adapter_path, held_out_beginnings
from w2s_fast.demo.beginnings import training_beginnings
from w2s_fast.real import REAL_MODELS, SMOLLM2

peft = pytest.importorskip("peft")

from w2s_fast.demo.tune import (  # noqa: E402
    HUB_ID,
    Group,
    Recipe,
    dpo_loss,
    measured_on,
    response_log_probs,
    train,
    write_card,
)

LAYERS, WIDTH = 30, 576  # of SmolLM2 135M


def test_beginnings_held_out_are_none_of_those_trained_on() -> None:
    training, held_out = training_beginnings(), held_out_beginnings()
    assert len(set(training)) == len(training) == 80
    assert len(set(held_out)) == len(held_out) == 120
    assert not set(training) & set(held_out)
    assert all(line == line.strip() for line in (*training, *held_out))


def test_the_bundled_adapter_is_small_and_as_peft_saves_one() -> None:
    folder = adapter_path()
    files = [path for path in folder.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 4_000_000
    config = peft.PeftConfig.from_pretrained(str(folder))
    assert config.peft_type == "LORA" and config.base_model_name_or_path == HUB_ID
    assert SMOLLM2 in REAL_MODELS and SMOLLM2 in HUB_ID.lower()
    with safe_open(folder / "adapter_model.safetensors", "pt") as weights:
        names = list(weights.keys())
        shapes = {name: weights.get_slice(name).get_shape() for name in names}
        dtypes = {weights.get_slice(name).get_dtype() for name in names}
    assert dtypes == {"BF16"}
    queries = [name for name in shapes if name.endswith("q_proj.lora_A.weight")]
    assert len(queries) == LAYERS
    assert all(shapes[name] == [config.r, WIDTH] for name in queries)


def test_the_bundled_adapter_has_a_card() -> None:
    card = (adapter_path() / "README.md").read_text()
    for told in ("license: apache-2.0", f"base_model: {HUB_ID}", "make real-adapter", "Measured"):
        assert told in card


RIGHT = "accuracy on pairs of their samples"


def test_the_extremes_of_a_group() -> None:
    group = Group([1], [[i] for i in range(10)], [1 - i / 10 for i in range(10)])
    ends = group.extremes(2)
    assert ends.responses == [[0], [1], [8], [9]]
    assert ends.rewards == [group.rewards[i] for i in (0, 1, 8, 9)]
    assert len(group.extremes(99).rewards) == 10
    assert ends.better(0.25).tolist() == [
        [a - b > 0.25 for b in ends.rewards] for a in ends.rewards
    ]


def test_the_loss_is_the_mean_over_good_with_bad_ones() -> None:
    group = Group([1], [[1], [2], [3], [4]], [0.9, 0.5, 0.45, 0.1])
    ratios = torch.tensor([1.0, 0.0, 3.0, 5.0])
    recipe = Recipe(margin=0.1, beta=0.5)
    each = [-F.logsigmoid(torch.tensor(0.5 * m)) for m in (1.0 - 3.0, 1.0 - 5.0, 0.0 - 5.0)]
    torch.testing.assert_close(dpo_loss(ratios, group, recipe), torch.stack(each).mean())


def test_log_probs_are_those_of_a_forward_by_itself(tmp_path: Path) -> None:
    model = tiny_adapter(save_tiny(tmp_path / "untuned"))
    group = Group([65, 66], [[70, 71, 72], [80]], [1.0, 0.0])
    with torch.no_grad():
        found = response_log_probs(model, group)
        for response, value in zip(group.responses, found, strict=True):
            logits = model(input_ids=torch.tensor([group.prompt + response])).logits[0, 1:-1]
            own = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum()
            torch.testing.assert_close(value, own)


def tiny_adapter(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def test_training_prefers_the_chosen_and_is_the_same_again(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "untuned")
    responses = [[70, 71, 72], [70, 72, 71], [80, 81], [81, 80]]
    groups = [Group([65 + i], responses, [0.9, 0.8, 0.1, 0.0]) for i in range(6)]
    recipe = Recipe(extremes=2, epochs=4, lr=1e-2)
    found = []
    for _ in range(2):
        model = tiny_adapter(folder)
        assert measured_on(model, groups, recipe)[RIGHT] == 0.0
        with Progress(disable=True) as progress:
            assert train(model, list(groups), recipe, progress) == 4 * 6
        measured = measured_on(model, groups, recipe)
        assert measured[RIGHT] == 1.0
        assert measured["that of the guide's choice among 8"] > 0.7
        found.append({n: w for n, w in model.state_dict().items() if "lora" in n})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    # What the adapter stands on has not changed.
    with model.disable_adapter(), torch.no_grad():
        ids = torch.tensor([[65, 66, 67]])
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_the_card_says_recipe_and_numbers(tmp_path: Path) -> None:
    write_card(Recipe(seed=3), {"minutes in all": 7.25, "steps": 106}, tmp_path)
    card = (tmp_path / "README.md").read_text()
    for told in ("- seed: 3", "- rank: ", "- minutes in all: 7.250", "- steps: 106"):
        assert told in card
