"""Heads of an odd vocabulary have a padded copy on CUDA: it changes no result, and no model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from unittest import mock

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from tests.support.engines import SEARCH, found, make_engine, models_of
from tests.support.tiny_models import FAMILIES, VOCABULARY, Triple, tiny_model, tiny_triple
from w2s_fast.engine import served
from w2s_fast.models import activations_of
from w2s_fast.models.activations import Activations
from w2s_fast.models.lm_head import LMHead
from w2s_fast.models.model import PagedModel

PITCH = 64  # of logits of 20 ids
PROMPTS = [[p % 18 + 1 for p in range(9 + 5 * i)] for i in range(3)]


@pytest.fixture(autouse=True)
def padded_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA."""
    monkeypatch.setattr("w2s_fast.models.lm_head.pads_heads", lambda _: True)


@pytest.fixture
def own() -> Triple:
    """Models that no other test sees."""
    return Triple(*(copy.deepcopy(model) for model in tiny_triple(layers=2, dtype=torch.float32)))


def head_of(model: PreTrainedModel) -> LMHead:
    return PagedModel(model, kv_cache_tokens=256).head


def hidden_states(width: int = 16) -> torch.Tensor:
    return torch.randn(9, width, generator=torch.Generator().manual_seed(3))


def with_bias(model: PreTrainedModel) -> PreTrainedModel:
    model = copy.deepcopy(model)
    model.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, VOCABULARY))
    return model


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_log_probs_are_those_of_the_model(family: str, biased: bool) -> None:
    model = tiny_model(family, dtype=torch.float32)
    model = with_bias(model) if biased else model
    head, hidden = head_of(model), hidden_states()
    with mock.patch("w2s_fast.models.lm_head.pads_heads", return_value=False):
        plain = head_of(model)
    logits = head.logits(hidden)
    assert logits.shape == (9, VOCABULARY) and logits.stride() == (PITCH, 1)
    assert plain.logits(hidden).stride() == (VOCABULARY, 1)
    torch.testing.assert_close(logits, plain.logits(hidden))
    tokens = torch.arange(9)
    for size in (None, VOCABULARY, 17):
        expected = plain.token_partials(hidden, tokens, size).logprobs()
        torch.testing.assert_close(head.token_partials(hidden, tokens, size).logprobs(), expected)


def test_a_forbidden_id_stays_forbidden() -> None:
    served = PagedModel(tiny_model(dtype=torch.float32), kv_cache_tokens=256)
    served.forbid([3, 19])
    hidden = hidden_states()
    logits = served.logits(hidden)
    assert logits.shape == (9, VOCABULARY) and logits.stride() == (PITCH, 1)
    assert (logits == -torch.inf).nonzero()[:, 1].unique().tolist() == [3, 19]
    assert served.logits(hidden, own=True).isfinite().all()
    tokens = torch.arange(9)
    expected = logits.log_softmax(-1)[tokens, tokens]
    torch.testing.assert_close(served.token_partials(hidden, tokens).logprobs(), expected)


def test_a_search_finds_the_same() -> None:
    triple = tiny_triple()
    padded = make_engine(*triple)
    assert all(model.head.padded_bytes == PITCH * 16 * 8 for model in models_of(padded))
    with mock.patch("w2s_fast.models.lm_head.pads_heads", return_value=False):
        plain = make_engine(*triple)
    assert not any(model.head.padded_bytes for model in models_of(plain))
    for ours, theirs in zip(padded.generate(PROMPTS, SEARCH), plain.generate(PROMPTS, SEARCH)):
        assert [h.token_ids for h in ours.hypotheses] == [h.token_ids for h in theirs.hypotheses]
        assert [h.score for h in ours.hypotheses] == pytest.approx(
            [h.score for h in theirs.hypotheses]
        )


def in_place(head: nn.Linear) -> None:
    with torch.no_grad():
        head.weight.mul_(-0.7)


def by_another_parameter(head: nn.Linear) -> None:
    head.weight = nn.Parameter(head.weight.detach() * -0.7)


def by_other_storage(head: nn.Linear) -> None:
    head.weight.data = head.weight.data * -0.7


def unseen(head: nn.Linear) -> None:
    head.weight.data.mul_(-0.7)


@pytest.mark.parametrize("change", [in_place, by_another_parameter, by_other_storage, unseen])
@pytest.mark.parametrize("which", ["base", "tuned"])
def test_a_changed_head_is_followed(
    own: Triple, which: str, change: Callable[[nn.Linear], None]
) -> None:
    engine = make_engine(*own)
    before = found(engine.generate(PROMPTS, SEARCH))
    change(getattr(own, which).get_output_embeddings())
    if change is unseen:
        engine.weights_changed()
    after = found(engine.generate(PROMPTS, SEARCH))
    assert after == found(make_engine(*own).generate(PROMPTS, SEARCH))
    assert after != before


def test_what_recorded_passes_read_stays_where_it_is(own: Triple) -> None:
    model = PagedModel(own.base, kv_cache_tokens=256)
    copied = model.head._padded
    assert copied is not None
    place = copied.weight.data_ptr()
    by_another_parameter(own.base.lm_head)
    assert model.follow()
    assert model.head._padded is copied and copied.weight.data_ptr() == place
    assert torch.equal(copied.weight[:VOCABULARY], own.base.lm_head.weight)
    assert not copied.weight[VOCABULARY:].any()


def test_the_callers_model_and_generator_are_left_as_they_are() -> None:
    model = copy.deepcopy(tiny_model("gpt2", dtype=torch.float32))
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    head_of(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.lm_head.weight is model.transformer.wte.weight
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_who_hooks_into_the_head_is_heard(own: Triple) -> None:
    model, hidden = PagedModel(own.base, kv_cache_tokens=256), hidden_states()
    expected = model.head.logits(hidden)
    with own.base.lm_head.register_forward_hook(lambda _module, _args, out: out + 1):
        torch.testing.assert_close(model.head.logits(hidden), expected + 1)
    torch.testing.assert_close(model.head.logits(hidden), expected)


def test_a_head_with_a_forward_of_its_own_runs_it(own: Triple) -> None:
    head = own.base.lm_head
    head.forward = MethodType(lambda self, x: nn.functional.linear(x, self.weight) * 2, head)
    hidden = hidden_states()
    torch.testing.assert_close(head_of(own.base).logits(hidden), 2 * hidden @ head.weight.T)


def test_other_heads_have_no_copy(own: Triple, monkeypatch: pytest.MonkeyPatch) -> None:
    class Special(nn.Linear):
        """As a quantised head is."""

    assert head_of(tiny_model(vocab_size=128, dtype=torch.float32)).padded_bytes == 0
    own.base.lm_head.__class__ = Special
    assert head_of(own.base).padded_bytes == 0
    monkeypatch.undo()
    assert head_of(own.tuned).padded_bytes == 0  # on a CPU


def test_copies_take_their_room_from_the_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(dtype=torch.float32)
    assert activations_of(model, lambda _work: 0).head == PITCH * 16 * 4
    models = [mock.Mock(device=torch.device("cuda", 0), head=head) for head in (1000, 30, 30)]
    monkeypatch.setattr(served, "activations_of", lambda m: Activations(1 << 20, 9, m.head))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    _, needed = served._passes(models, 100, 256)
    monkeypatch.setattr(served, "activations_of", lambda m: Activations(1 << 20, 9))
    assert needed - served._passes(models, 100, 256)[1] == 1060
