"""Weights that are changed under an engine: what was computed before is never used again."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from tests.support.engines import SEARCH, assert_all_pages_free, found, make_engine, quiet
from tests.support.tiny_models import Triple, tiny_triple
from w2s_fast import AsyncEngine, Engine, SearchParams
from w2s_fast.cache import PagePool
from w2s_fast.errors import EngineFailure, UnsupportedModel
from w2s_fast.search import Request, Search

PROMPTS = [[p % 18 + 1 for p in range(9 + 5 * i)] for i in range(3)]
SLOW = SearchParams(method="bon", successors=3, max_new_tokens=40, ignore_eos=True, seed=2)


def models() -> Triple:
    """Models that no other test sees."""
    return Triple(*(copy.deepcopy(model) for model in tiny_triple(layers=2, dtype=torch.float32)))


def middle(model: PreTrainedModel) -> nn.Parameter:
    return next(p for name, p in model.named_parameters() if "1" in name and p.ndim == 2)


def by_an_optimizer(model: PreTrainedModel) -> None:
    weight = middle(model)
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.3).step()
    weight.grad = None


def by_load_state_dict(model: PreTrainedModel) -> None:
    model.load_state_dict({k: v * 1.3 for k, v in model.state_dict().items()})


def by_another_parameter(model: PreTrainedModel) -> None:
    name = next(n for n, p in model.named_parameters() if p is middle(model))
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, nn.Parameter(middle(model).detach() * -1))


def by_other_storage(model: PreTrainedModel) -> None:
    middle(model).data = middle(model).data * -1


def by_a_setting(model: PreTrainedModel) -> None:
    for module in model.modules():
        if hasattr(module, "scaling"):
            module.scaling *= 3
        if hasattr(module, "eps"):
            module.eps = 0.5


CHANGES = [
    by_an_optimizer, by_load_state_dict, by_another_parameter, by_other_storage, by_a_setting,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("which", ["base", "tuned"])
def test_prompts_that_were_kept_are_computed_anew(
    which: str, change: Callable[[PreTrainedModel], None]
) -> None:
    own = models()
    engine = make_engine(*own)
    before = found(engine.generate(PROMPTS, SEARCH))
    change(getattr(own, which))
    after = found(engine.generate(PROMPTS, SEARCH))
    assert after == found(make_engine(*own).generate(PROMPTS, SEARCH))
    assert after != before
    assert_all_pages_free(engine)


@pytest.mark.parametrize("announced", [False, True])
@pytest.mark.parametrize("place", [(PagePool, "drop_cache"), (Search, "start_over")])
def test_who_is_interrupted_while_following_a_change_follows_it_again(
    place: tuple[Any, str], announced: bool
) -> None:
    own = models()
    engine = make_engine(*own)
    engine.generate(PROMPTS, SEARCH)
    request = engine.make_request(PROMPTS[0], SLOW)
    engine.runner.submit(request)
    engine.runner.advance([request])  # it is in the middle of its round
    if announced:
        middle(own.tuned).data.mul_(-1)
        engine.weights_changed()
    else:
        by_an_optimizer(own.tuned)
    with mock.patch.object(*place, side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS, SEARCH)
    after = found(engine.generate(PROMPTS, SEARCH))
    fresh = make_engine(*own)
    assert after == found(fresh.generate(PROMPTS, SEARCH))
    while not request.ended:
        engine.runner.advance([request])
    # What was drawn before it was interrupted counts as sampled, too.
    (ours,), (wanted,) = found([engine.result(request)]), found(fresh.generate([PROMPTS[0]], SLOW))
    assert ours[:2] == wanted[:2]
    assert_all_pages_free(engine)


def test_a_change_that_nothing_shows_is_announced() -> None:
    own = models()
    engine = make_engine(*own)
    engine.generate(PROMPTS, SEARCH)
    middle(own.base).data.mul_(-1)
    engine.weights_changed()
    after = found(engine.generate(PROMPTS, SEARCH))
    assert after == found(make_engine(*own).generate(PROMPTS, SEARCH))


def test_weights_made_in_inference_mode_are_served_and_their_changes_announced() -> None:
    with torch.inference_mode():
        own = models()
    assert middle(own.base).is_inference()
    engine = make_engine(*own)
    engine.generate(PROMPTS, SEARCH)
    with torch.inference_mode():
        middle(own.tuned).mul_(-1)
    engine.weights_changed()
    after = found(engine.generate(PROMPTS, SEARCH))
    assert after == found(make_engine(*own).generate(PROMPTS, SEARCH))


def test_scores_of_given_texts_follow_the_weights() -> None:
    own = models()
    engine = make_engine(*own)
    engine.score(PROMPTS, [[5, 6]] * 3)
    by_an_optimizer(own.tuned)
    expected = make_engine(*own).score(PROMPTS, [[5, 6]] * 3)
    assert engine.score(PROMPTS, [[5, 6]] * 3) == pytest.approx(expected, abs=1e-5)


def test_training_itself_changes_nothing() -> None:
    own = models()
    engine = make_engine(*own)
    expected = found(engine.generate(PROMPTS, SEARCH))
    kept = engine.base.pool.cached_pages
    for model in own:
        model.train()
        older = model.gradient_checkpointing_enable
        getattr(model, "activation_checkpointing_enable", older)()
        model(torch.tensor(PROMPTS[:1])).logits.sum().backward()
        assert not engine.base.follow()
    assert engine.base.pool.cached_pages == kept > 0
    assert [r[0] for r in found(engine.generate(PROMPTS, SEARCH))] == [r[0] for r in expected]
    assert all(model.training for model in own)


def steps(engine: Engine, request: Request, count: int) -> None:
    for _ in range(count):
        engine.runner.advance([request])


def finish(engine: Engine, request: Request) -> list[Any]:
    while not request.ended:
        steps(engine, request, 1)
    return found([engine.result(request)])


def test_a_request_in_its_first_round_begins_again_with_the_new_weights() -> None:
    own = models()
    engine = make_engine(*own)
    request = engine.make_request(PROMPTS[1], SLOW)
    engine.runner.submit(request)
    steps(engine, request, 2)
    assert request.beams.candidates[0].tokens
    by_an_optimizer(own.base)
    (after,) = finish(engine, request)
    (expected,) = found(make_engine(*own).generate([PROMPTS[1]], SLOW))
    assert after[:2] == expected[:2]
    assert after[2] != expected[2]  # usage: what was drawn in vain was sampled
    assert_all_pages_free(engine)


def test_a_request_keeps_its_hypotheses_and_goes_on_with_the_new_weights() -> None:
    params = replace(SEARCH, chunk_length=20, max_new_tokens=60, ignore_eos=True, n=1)
    own = models()
    engine = make_engine(*own)
    request = engine.make_request(PROMPTS[1], params)
    engine.runner.submit(request)
    while not (request.beams.round == 2 and request.in_round):
        steps(engine, request, 1)
    kept = [list(beam.tokens) for beam in request.beams.kept]
    for model in own:
        by_an_optimizer(model)
    calls = engine.base.pool.cache_statistics.lookup_tokens
    finish(engine, request)
    result = engine.result(request)
    assert result.error is None and result.token_ids[:20] in kept
    # Recomputed: the log-probs of what came later are those of the new weights alone.
    text = torch.tensor([PROMPTS[1] + result.token_ids])
    with torch.no_grad():
        logprobs = own.base(text, use_cache=False).logits[0].float().log_softmax(-1)
    first = len(PROMPTS[1]) - 1
    wanted = [float(logprobs[first + i, token]) for i, token in enumerate(result.token_ids)]
    got = result.hypotheses[0].token_logprobs
    assert got[20:] == pytest.approx(wanted[20:], abs=1e-3)
    assert got[:20] != pytest.approx(wanted[:20], abs=1e-3)
    assert engine.base.pool.cache_statistics.lookup_tokens > calls
    assert_all_pages_free(engine)


def test_tokens_that_were_given_out_are_not_taken_back() -> None:
    own = models()
    engine = make_engine(*own)
    params = SearchParams(method="sample", max_new_tokens=60, ignore_eos=True)
    neighbour = engine.make_request(PROMPTS[0], SEARCH)
    pieces = engine.stream(PROMPTS[1], params)
    assert next(pieces).token_ids
    by_an_optimizer(own.base)
    engine.runner.submit(neighbour)
    with pytest.raises(EngineFailure, match=r"weights of base changed .* been streamed"):
        list(pieces)
    expected = found(make_engine(*own).generate([PROMPTS[0]], SEARCH))
    assert finish(engine, neighbour) == expected
    assert quiet(engine)


def test_an_async_engine_follows_too() -> None:
    own = models()

    async def run() -> object:
        async with AsyncEngine(make_engine(*own)) as engine:
            await engine.generate(PROMPTS[1], SEARCH)
            middle(own.base).data.mul_(-1)
            engine.weights_changed()
            return found([await engine.generate(PROMPTS[1], SEARCH)])

    assert asyncio.run(run()) == found(make_engine(*own).generate([PROMPTS[1]], SEARCH))


def test_another_kind_of_model_is_refused_by_name_until_it_is_the_same_again() -> None:
    own = models()
    engine = make_engine(*own)
    expected = found(engine.generate(PROMPTS, SEARCH))
    own.tuned.double()
    (failed,) = engine.generate([PROMPTS[0]], SEARCH, on_error="return")
    assert isinstance(failed.error, EngineFailure)
    assert "tuned: GPT2LMHeadModel" in str(failed.error) and "dtype" in str(failed.error)
    with pytest.raises(UnsupportedModel, match="make a new engine"):
        engine.score([PROMPTS[0]], [[3]])
    own.tuned.float()
    assert found(engine.generate(PROMPTS, SEARCH)) == expected
    layer = own.base.model.layers[0]
    own.base.model.layers[0] = copy.deepcopy(layer)
    with pytest.raises(EngineFailure, match=r"base: LlamaForCausalLM .* its modules"):
        engine.generate([PROMPTS[0]], SEARCH)
