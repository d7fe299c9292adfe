"""A model object that its caller goes on using: it is never touched, and answers stay right."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Iterator
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from tests.support.engines import SEARCH, found, make_engine
from tests.support.tiny_models import FAMILIES, draw_weights, tiny_model, tiny_triple
from w2s_fast.errors import UnsupportedModel
from w2s_fast.models.model import PagedModel

TEXT = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
PROMPTS = [[3, 1, 4], [15], [2, 7, 1, 8]]


def own(family: str = "llama", **options: Any) -> PreTrainedModel:
    """A model that no other test sees."""
    return copy.deepcopy(tiny_model(family, dtype=torch.float32, **options))


def served(model: PreTrainedModel) -> PagedModel:
    return PagedModel(model, kv_cache_tokens=256, page_size=4)


def logits(model: PagedModel, text: Tensor = TEXT) -> Tensor:
    (slot,) = model.pool.allocate(1)
    try:
        return model.logits(model.forward([slot], text, [len(text)]))
    finally:
        model.pool.release([slot])


def state(model: nn.Module) -> list[Any]:
    """All that modules hold, besides weights."""
    return [
        (name, {key: id(value) for key, value in vars(module).items()}, module.training)
        for name, module in model.named_modules()
    ]


def with_dropout() -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=20, n_positions=64, n_embd=16, n_layer=2, n_head=2,
        bos_token_id=1, eos_token_id=0, attn_pdrop=0.5, embd_pdrop=0.5, resid_pdrop=0.5,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = GPT2LMHeadModel(config)
    draw_weights(model, seed=0, peak=2.0)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_of_the_callers_model_changes(family: str) -> None:
    model = own(family)
    model.train()
    next(module for module in model.modules() if not list(module.children())).eval()
    before, config = state(model), model.config.to_dict()
    paged = served(model)
    logits(paged)
    assert state(model) == before
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == "eager"
    assert not paged.view.training and paged.view.config._attn_implementation == "w2s_paged"


def test_dropout_is_off_whatever_mode_the_model_is_in() -> None:
    model = with_dropout().eval()
    with torch.no_grad():
        expected = model(TEXT[None], use_cache=False).logits[0]
    model.train()
    paged = served(model)
    torch.testing.assert_close(logits(paged), expected)
    model.eval()
    model.train()  # between two passes
    torch.testing.assert_close(logits(paged), expected)
    assert all(module.training for module in model.modules())


def test_weights_are_shared_tied_ones_too() -> None:
    model = own("gpt2")
    view = served(model).view
    assert view.get_output_embeddings().weight is view.get_input_embeddings().weight
    for (name, ours), (_, theirs) in zip(view.named_parameters(), model.named_parameters()):
        assert ours is theirs, name
    assert [n for n, _ in view.named_modules()] == [n for n, _ in model.named_modules()]
    assert not set(map(id, view.modules())) & set(map(id, model.modules()))


def test_what_a_search_finds_does_not_depend_on_autocast() -> None:
    models = tiny_triple(dtype=torch.float32)
    engine = make_engine(*models)
    expected = found(engine.generate(PROMPTS, SEARCH))
    scores = engine.score(PROMPTS[:1], [[5, 6, 7]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        other = make_engine(*models)
        for e in (engine, other):
            assert found(e.generate(PROMPTS, SEARCH)) == expected
            assert e.score(PROMPTS[:1], [[5, 6, 7]]) == pytest.approx(scores, abs=1e-5)
    # And the prompts that it has kept are as exact as others.
    assert found(other.generate(PROMPTS, SEARCH)) == expected


def test_a_caller_may_ask_for_other_outputs() -> None:
    model = own("mixtral")
    expected = logits(served(model))
    model.config.output_hidden_states = model.config.output_router_logits = True
    model.config.return_dict = False
    torch.testing.assert_close(logits(served(model)), expected)


@pytest.mark.parametrize("other", ["engine", "caller"])
def test_another_thread_may_run_the_model_in_the_middle_of_a_pass(other: str) -> None:
    model = own()
    paged, second = served(model), served(model)
    expected = logits(paged)
    seen: list[Tensor] = []

    def beside() -> None:
        with torch.no_grad():
            theirs = model(TEXT[None], use_cache=False).logits[0]
        seen.append(theirs if other == "caller" else logits(second))

    def run_beside(*_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=beside)
            thread.start()
            thread.join()

    model.model.layers[0].register_forward_hook(run_beside)
    torch.testing.assert_close(logits(paged), expected)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], expected)


def test_hooks_that_come_later_see_every_pass() -> None:
    model = own()
    paged, seen = served(model), []
    handle = model.model.layers[1].register_forward_hook(lambda module, *_: seen.append(module))
    logits(paged)
    handle.remove()
    logits(paged)
    assert len(seen) == 1


def replaced_by_method(module: nn.Module) -> None:
    """As libraries of faster layers do it."""
    before = type(module).forward
    module.forward = MethodType(lambda self, x: before(self, x) * 2, module)


def replaced_by_partial(module: nn.Module) -> None:
    """As accelerate does it."""
    module._old_forward = module.forward
    module.forward = functools.partial(lambda m, x: m._old_forward(x) * 2, module)


@pytest.mark.parametrize("replace", [replaced_by_method, replaced_by_partial])
def test_a_replaced_forward_runs_on_our_own_modules(replace: Any) -> None:
    model = own()
    seen = []
    replace(model.model.layers[0].mlp)
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda m, *_: seen.append(m))
    with torch.no_grad():
        expected = model(TEXT[None], use_cache=False).logits[0]
    paged = served(model)
    seen.clear()
    torch.testing.assert_close(logits(paged), expected)
    assert seen and seen[0] is paged.view.model.layers[0].mlp.act_fn


def test_a_forward_that_holds_on_to_the_callers_modules_is_refused() -> None:
    model = own()
    mlp = model.model.layers[0].mlp
    before = mlp.forward
    mlp.forward = lambda x: before(x) * 2
    with pytest.raises(UnsupportedModel, match=r"forward of its LlamaMLP was replaced"):
        served(model)


def modules_outside_the_tree(model: PreTrainedModel) -> Iterator[nn.Module]:
    """References to modules that torch does not know as children."""
    yield from model.also["here"]


def test_references_to_modules_in_attributes_lead_to_our_own() -> None:
    model = own()
    object.__setattr__(model, "also", {"here": [model.model.layers[0], model.lm_head]})
    view = served(model).view
    ours = list(modules_outside_the_tree(view))
    assert ours[0] is view.model.layers[0] and ours[1] is view.lm_head


def test_parametrized_weights_are_computed_from_what_they_are_now() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * 2

    model = own()
    nn.utils.parametrize.register_parametrization(model.model.layers[0].mlp.up_proj, "weight",
                                                  Doubled())  # fmt: skip
    paged = served(model)
    for _ in range(2):
        with torch.no_grad():
            expected = model(TEXT[None], use_cache=False).logits[0]
        torch.testing.assert_close(logits(paged), expected)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.parametrizations.weight.original.mul_(0.5)
