"""Adapters beside a model's weights compute what PEFT computes, and what merged weights do."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.support.adapters import LINEAR, save_adapter, with_adapter
from tests.support.tiny_models import tiny_model
from w2s_fast.errors import UnsupportedModel
from w2s_fast.models import Groups, LowRank, PagedModel, find_adapter, read_adapter
from w2s_fast.models.adapters import Adapter

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning")

ATOL = 1e-4
TEXT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
ALL = LINEAR["llama"]
# Some are nothing but themselves in PEFT, and something else once they are merged: with tied
# embeddings PEFT merges into the one weight what was trained for one of its two uses.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ALL}),
    "all-linear": ("qwen3", {"target_modules": "all-linear"}),
    "of GPT-2": ("gpt2", {"target_modules": LINEAR["gpt2"]}),
    "of Gemma 2": ("gemma2", {"target_modules": ["q_proj", "down_proj"]}),
    "of Phi-3": ("phi3", {"target_modules": ["qkv_proj", "down_proj"]}),
    "of Mixtral's attention": ("mixtral", {"target_modules": ["q_proj", "v_proj"]}),
    "rank patterns": (
        "llama",
        {"target_modules": ALL, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"k_proj": 9}},
    ),
    "some layers": ("llama", {"target_modules": ALL, "layers_to_transform": [1]}),
    "rslora": ("llama", {"target_modules": ALL, "use_rslora": True}),
    "biases of its own": ("gpt2", {"target_modules": LINEAR["gpt2"], "lora_bias": True}),
    "dora": ("llama", {"target_modules": ALL, "use_dora": True}),
    "dora of GPT-2": ("gpt2", {"target_modules": LINEAR["gpt2"], "use_dora": True}),
    "saved head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "saved norms": ("qwen3", {"target_modules": ["q_proj"], "modules_to_save": ["q_norm"]}),
    "saved embeddings": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ),
    "head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "dora of the head": ("llama", {"target_modules": ["lm_head"], "use_dora": True}),
    "embeddings": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "dora of embeddings": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "some tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]}),
    "tied, plain": ("tied", {"target_modules": ALL}),
    "tied, saved": (
        "tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ),
    "tied, some tokens": (
        "tied",
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]},
    ),
    "tied, embeddings": ("tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied, head": ("tied", {"target_modules": ["q_proj", "lm_head"]}),
}
DIFFERENT_WHEN_MERGED = {"tied, embeddings", "tied, head"}


def model_of(family: str) -> PreTrainedModel:
    if family != "tied":
        return tiny_model(family, dtype=torch.float32)
    model = copy.deepcopy(tiny_model("llama", dtype=torch.float32))
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def adapter_of(model: PreTrainedModel, folder: Path, **settings: Any) -> Adapter:
    files = find_adapter(save_adapter(model, folder, **settings))
    assert files is not None
    return read_adapter(files, model)


def served(model: PreTrainedModel, adapter: Adapter | None = None, **options: Any) -> PagedModel:
    name = "untuned" if adapter is None else "tuned"
    options = {"page_size": 4, "kv_cache_tokens": 512, "max_slots": 16, **options}
    return PagedModel(model, name, adapter=adapter, **options)


def eager(model: PreTrainedModel, text: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([text]), use_cache=False).logits[0]
    return logits.log_softmax(-1)


def in_two_passes(
    models: list[PagedModel], texts: list[list[list[int]]], together: bool
) -> list[list[torch.Tensor]]:
    """Log-probs [T, V] of each model's texts, which are run in two parts."""
    groups = Groups(models)
    assert [len(own) for own in groups.members] == [len(models)]
    slots = [model.pool.allocate(len(own)) for model, own in zip(models, texts)]
    found: list[list[list[torch.Tensor]]] = [[[] for _ in own] for own in texts]
    for part in (0, 1):
        pieces = [[text[:4] if part == 0 else text[4:] for text in own] for own in texts]
        counts = [[len(piece) for piece in own] for own in pieces]
        tokens = [[token for piece in own for token in piece] for own in pieces]
        if together:
            hidden = [own for _, _, own in groups.forward(0, slots, tokens, counts)]
        else:
            hidden = [model.forward(*args) for model, *args in zip(models, slots, tokens, counts)]
        for m, (model, own, lengths) in enumerate(zip(models, hidden, counts)):
            for text, logits in zip(found[m], model.logits(own).split(lengths)):
                text.append(logits.log_softmax(-1))
    for model, own in zip(models, slots):
        model.pool.release(own)
    return [[torch.cat(parts) for parts in own] for own in found]


@pytest.mark.parametrize("kind", KINDS)
def test_passes_equal_pefts_and_merged_weights(kind: str, tmp_path: Path) -> None:
    family, settings = KINDS[kind]
    model = model_of(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    base, tuned = eager(model, TEXT), served(model, adapter_of(model, tmp_path, **settings))
    peft = eager(with_adapter(model, tmp_path), TEXT)
    assert float((peft - base).abs().max()) > 1  # of something that shows
    merged = eager(with_adapter(model, tmp_path, merge=True), TEXT)
    if kind in DIFFERENT_WHEN_MERGED:
        assert not torch.allclose(merged, peft, atol=0.1)
    else:
        torch.testing.assert_close(merged, peft, atol=ATOL, rtol=0)

    untuned = served(model)
    for together in (True, False):
        texts = [[TEXT, TEXT[2:]], [TEXT[1:], TEXT]]
        found = in_two_passes([untuned, tuned], texts, together)
        expected = [base, eager(model, TEXT[2:])]
        torch.testing.assert_close(found[0], expected, atol=ATOL, rtol=0)
        expected = [eager(with_adapter(model, tmp_path), TEXT[1:]), peft]
        torch.testing.assert_close(found[1], expected, atol=ATOL, rtol=0)
    targets = torch.tensor(TEXT)
    slots = tuned.pool.allocate(1)
    partials = tuned.token_partials(tuned.forward(slots, TEXT, [len(TEXT)]), targets)
    expected = peft.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(partials.logprobs(), expected, atol=ATOL, rtol=0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_ten_adapters_run_in_one_pass_over_one_model(tmp_path: Path) -> None:
    model = model_of("llama")
    folders = [
        save_adapter(model, tmp_path / str(i), seed=i, target_modules=kind, r=2 + i % 3)
        for i, kind in enumerate([ALL, ["q_proj"], ["lm_head", "v_proj"], ["embed_tokens"]] * 3)
    ][:10]
    adapters = [read_adapter(find_adapter(folder), model) for folder in folders]  # type: ignore[arg-type]
    models = [served(model), *(served(model, adapter) for adapter in adapters)]
    texts = [[TEXT[i % 4 :]] for i in range(11)]
    found = in_two_passes(models, texts, together=True)
    expected = [[eager(model, TEXT)]]
    for (text,), folder in zip(texts[1:], folders):
        expected.append([eager(with_adapter(model, folder), text)])
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)
    weights = {id(p) for own in models for p in own.model.parameters()}
    assert weights == {id(p) for p in model.parameters()}


def test_passes_that_are_too_large_run_one_after_the_other(tmp_path: Path) -> None:
    model = model_of("llama")
    adapter = adapter_of(model, tmp_path, target_modules=ALL)
    models = [served(model, own, max_pass_tokens=9) for own in (None, adapter)]
    groups = Groups(models)
    slots = [own.pool.allocate(2) for own in models]
    tokens, counts = TEXT[:9], [4, 5]
    parts = list(groups.forward(0, slots, [tokens, tokens], [counts, counts]))
    assert [(i, len(hidden)) for i, _, hidden in parts] == [(0, 9), (1, 9)]
    parts = list(groups.forward(0, slots, [TEXT[:4], TEXT[:5]], [[2, 2], [2, 3]]))
    assert [(i, len(hidden)) for i, _, hidden in parts] == [(0, 4), (1, 5)]
    assert [own.pool.lengths(s).tolist() for own, s in zip(models, slots)] == [[6, 7], [6, 8]]


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_weights_that_change_are_followed(settings: dict[str, Any], tmp_path: Path) -> None:
    model = copy.deepcopy(model_of("llama"))
    models = [
        served(model),
        served(model, adapter_of(model, tmp_path, target_modules=ALL, **settings)),
    ]
    groups = Groups(models)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name:
                parameter.mul_(-1.5)
    model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(
        model.model.layers[1].mlp.up_proj.weight.detach() * -0.5
    )
    assert all(own.follow() for own in models)
    slots = [own.pool.allocate(1) for own in models]
    new = [len(TEXT)]
    found = [own for _, _, own in groups.forward(0, slots, [TEXT, TEXT], [new, new])]
    ours = [own.logits(hidden).log_softmax(-1) for own, hidden in zip(models, found)]
    expected = [eager(model, TEXT), eager(with_adapter(model, tmp_path), TEXT)]
    torch.testing.assert_close(ours, expected, atol=ATOL, rtol=0)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a module with others in it": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]},
        r"layers.0.mlp cannot be changed .* ModulesToSaveWrapper for a LlamaMLP",
    ),
    "experts": (
        "mixtral",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
        r"mlp.experts cannot be changed beside the model's weights: ParamWrapper",
    ),
    "weights that training has changed": (
        "llama",
        {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
        r"init_lora_weights='pissa', which changes the model's weights",
    ),
    "from a token on": (
        "llama",
        {"target_modules": ["q_proj"], "alora_invocation_tokens": [3]},
        r"q_proj cannot be changed beside the model's weights: ALoraLinearVariant",
    ),
    "biases of the model": (
        "gpt2",
        {"target_modules": ["c_attn"], "bias": "all"},
        r"has biases of the model itself \(bias='all'\)",
    ),
    "another task": (
        "llama",
        {"target_modules": ["q_proj"], "task_type": "FEATURE_EXTRACTION"},
        r"for the task FEATURE_EXTRACTION; allowed: CAUSAL_LM",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_stand_beside_the_weights_is_refused(case: str, tmp_path: Path) -> None:
    family, settings, why = REFUSED[case]
    model = copy.deepcopy(model_of(family))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UnsupportedModel, match=rf"^adapter '.*{why}"):
        adapter_of(model, tmp_path, **settings)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    files = find_adapter(save_adapter(model_of("llama"), tmp_path, target_modules=ALL))
    assert files is not None
    with pytest.raises(UnsupportedModel, match="PEFT cannot put it beside GPT2LMHeadModel"):
        read_adapter(files, model_of("gpt2"))
    with pytest.raises(UnsupportedModel, match=r"has weights for which LlamaForCausalLM"):
        read_adapter(files, tiny_model("llama", layers=1, dtype=torch.float32))
    with pytest.raises(UnsupportedModel, match=r"lacks weights that its config speaks of"):
        read_adapter(files, tiny_model("llama", layers=3, dtype=torch.float32))


def test_added_tokens_are_refused(tmp_path: Path) -> None:
    larger = tiny_model("llama", vocab_size=24, dtype=torch.float32)
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    files = find_adapter(save_adapter(larger, tmp_path, **settings))
    assert files is not None
    with pytest.raises(UnsupportedModel, match=r"embed_tokens.*\[24, 16\]"):
        read_adapter(files, model_of("llama"))


def test_embeddings_that_an_adapter_brings_along_have_to_be_the_models(tmp_path: Path) -> None:
    """Where it changes the LM head, PEFT saves what stands beneath it, too."""
    model, settings = model_of("llama"), {"target_modules": ["lm_head"]}
    larger = tiny_model("llama", vocab_size=24, dtype=torch.float32)
    files = find_adapter(save_adapter(larger, tmp_path / "larger", **settings))
    assert files is not None
    with pytest.raises(UnsupportedModel, match=r"another shape, as for added tokens: \[24, 16\]"):
        read_adapter(files, model)
    trained = copy.deepcopy(model)
    with torch.no_grad():
        trained.lm_head.weight.mul_(1.5)
    files = find_adapter(save_adapter(trained, tmp_path / "trained", **settings))
    assert files is not None
    before = model.lm_head.weight.clone()
    with pytest.raises(UnsupportedModel, match=r"lm_head.* has other values than the model's"):
        read_adapter(files, model)
    assert torch.equal(model.lm_head.weight, before)


@pytest.mark.parametrize("dora", [False, True])
def test_products_beside_packed_weights_have_a_dtype_of_their_own(dora: bool) -> None:
    """PEFT has them in float32 where a module's weight is no floating-point one."""
    torch.manual_seed(0)
    module, inputs = torch.nn.Linear(16, 24), torch.randn(5, 16)
    settings = {
        "down": torch.randn(3, 16), "up": torch.randn(24, 3), "scale": 0.5,
        "bias": torch.randn(24), "magnitude": torch.rand(24) if dora else None,
    }  # fmt: skip
    delta = LowRank(**settings, module=module, weight=lambda: module.weight.detach())
    with torch.no_grad():
        expected = module(inputs)
        delta.add_to(expected, inputs)
        half = copy.deepcopy(module).to(torch.bfloat16)
        delta = LowRank(**settings, module=half, weight=lambda: module.weight.detach())
        out = half(inputs.to(torch.bfloat16))
        delta.add_to(out, inputs.to(torch.bfloat16))
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out.float(), expected, atol=0.05, rtol=0.02)


def test_other_kinds_of_adapters_are_refused(tmp_path: Path) -> None:
    from peft import IA3Config, get_peft_model

    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    get_peft_model(copy.deepcopy(model_of("llama")), config).save_pretrained(tmp_path)
    files = find_adapter(tmp_path)
    assert files is not None
    with pytest.raises(UnsupportedModel, match="it is of the kind IA3; allowed: LORA"):
        read_adapter(files, model_of("llama"))


def test_an_adapter_is_told_from_a_model(tmp_path: Path) -> None:
    model = model_of("llama")
    assert find_adapter(model) is None and find_adapter(tmp_path) is None
    save_adapter(model, tmp_path / "adapter", target_modules=["q_proj"])
    model.save_pretrained(tmp_path / "model")
    assert find_adapter(tmp_path / "model") is None
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_model_name_or_path": "somewhere"}))
    found = find_adapter(str(tmp_path / "adapter"))
    assert found == (str(tmp_path / "adapter"), "somewhere")
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UnsupportedModel, match=r"beside a model \(model.safetensors\)"):
        find_adapter(tmp_path / "adapter")
    (tmp_path / "adapter" / "model.safetensors").unlink()
    path.write_text("{")
    with pytest.raises(UnsupportedModel, match="cannot be read"):
        find_adapter(tmp_path / "adapter")


def test_reading_an_adapter_draws_nothing_from_the_callers_generator(tmp_path: Path) -> None:
    model = model_of("llama")
    state = torch.random.get_rng_state()
    adapter_of(model, tmp_path, target_modules=ALL)
    assert torch.equal(torch.random.get_rng_state(), state)
