"""Engine.warm_up: the first usual request finds everything done, and nothing else has changed."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.engines import (
    LONG,
    LONG_PROMPTS,
    SEARCH,
    assert_all_pages_free,
    found,
    make_engine,
    models_of,
    quiet,
)
from tests.support.recorded import Recorded, replays, unrecorded_passes
from tests.support.tiny_models import Triple, tiny_model, tiny_triple
from w2s_fast import Engine, SearchParams
from w2s_fast.errors import NumericalError
from w2s_fast.search import Search

USUAL = SearchParams(beam_width=4, successors=4, chunk_length=5, max_new_tokens=20)


def recordings(engine: Engine) -> list[int]:
    return [len(own) for model in models_of(engine) for own in model.recorded]


def without_rehearsal(models: Triple) -> Engine:
    with mock.patch.object(Engine, "warm_up"):
        return Recorded.of(models).engine


@pytest.mark.parametrize("length", [24, 64, 100])
def test_the_first_usual_request_records_nothing_and_runs_from_recordings(length: int) -> None:
    models = tiny_triple(eos=())
    made = Recorded.of(models)
    engine = made.engine
    graphs = (made.steps, *made.rounds, *made.passes[1:])
    before, replayed = recordings(engine), [replays(own) for own in graphs]
    prompt = [p % 18 + 1 for p in range(length)]
    with unrecorded_passes() as unrecorded:
        results = engine.generate([prompt], USUAL)
    assert recordings(engine) == before
    # All but the prompts, which have any length; the rehearsal's has 64 tokens.
    as_rehearsed = length == 64
    assert unrecorded == ([] if as_rehearsed else [[length], [length - 1], [length - 1]])
    rounds = USUAL.max_new_tokens // USUAL.chunk_length
    # Steps, first tokens, and selections; and the prompts of the guides' models.
    expected = [rounds * (USUAL.chunk_length - 1), rounds - 1, rounds, 0, 0]
    if as_rehearsed:
        expected = [expected[0], rounds, rounds, 1, 1]
    assert [replays(own) for own in graphs] == [
        old + new for old, new in zip(replayed, expected, strict=True)
    ]
    plain = make_engine(*models)
    assert found(results) == found(plain.generate([prompt], USUAL))


def test_without_it_the_first_request_runs_without_recordings() -> None:
    engine = without_rehearsal(tiny_triple(eos=()))
    before = recordings(engine)
    with unrecorded_passes() as unrecorded:
        engine.generate(LONG_PROMPTS[:1], USUAL)
    assert [1] * 4 in unrecorded and [5] * 16 in unrecorded
    assert recordings(engine) != before


class Operators(TorchDispatchMode):
    """The operators of ours that run within: what is compiled for a GPU when it first runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "w2s_fast":
            self.seen.add(str(func))
        return func(*args, **(kwargs or {}))


def test_all_operators_of_the_first_usual_request_have_run_before() -> None:
    with Operators() as made:
        engine = without_rehearsal(tiny_triple(eos=()))
    with Operators() as warmed:
        engine.warm_up()
    with Operators() as asked:
        engine.generate(LONG_PROMPTS[:1], USUAL)
    assert asked.seen <= warmed.seen
    assert not asked.seen <= made.seen


def everything_seen(engine: Engine) -> Any:
    return engine.stats(), [
        (model.pool.cached_pages, model.pool.free_pages, model.pool.free_slots)
        for model in models_of(engine)
    ]


def test_it_leaves_no_trace() -> None:
    engine, *_ = Recorded.of(tiny_triple(eos=()), prefix_cache=True)
    engine.generate(LONG_PROMPTS, SEARCH)
    before = everything_seen(engine)
    assert before[0].pools["base"].cached_pages > 0
    torch.manual_seed(3)
    state = torch.get_rng_state()
    engine.warm_up()
    engine.warm_up()
    assert everything_seen(engine) == before
    assert torch.equal(torch.get_rng_state(), state)
    (again,) = engine.generate(LONG_PROMPTS[:1], SEARCH)
    assert again.stats is not None and again.stats.cached_tokens > 0  # what was cached still is


def test_requests_that_run_meanwhile_go_on() -> None:
    models = tiny_triple(eos=())
    engine, *_ = Recorded.of(models, kv_cache_tokens=700)
    expected = found(make_engine(*models).generate(LONG_PROMPTS[:2], LONG))
    requests = [engine.make_request(prompt, LONG) for prompt in LONG_PROMPTS[:2]]
    for request in requests:
        engine.runner.submit(request)
    for _ in range(3):
        engine.runner.advance(requests)
    engine.warm_up()
    for request in requests:
        while not request.ended:
            engine.runner.advance([request])
    assert found([engine.result(request) for request in requests]) == expected
    for model in models_of(engine):
        model.pool.drop_cache()
    assert_all_pages_free(engine)


def test_what_is_interrupted_leaves_nothing_behind() -> None:
    engine, *_ = Recorded.of(tiny_triple(eos=()))
    step = Search.step

    def interrupted(self: Search, requests: Any) -> None:
        step(self, requests)
        if requests[0].beams.round == 1:
            raise KeyboardInterrupt

    with mock.patch.object(Search, "step", interrupted), pytest.raises(KeyboardInterrupt):
        engine.warm_up()
    assert quiet(engine)
    engine.generate(LONG_PROMPTS[:1], SEARCH)
    for model in models_of(engine):
        model.pool.drop_cache()
    assert_all_pages_free(engine)


@pytest.mark.parametrize(
    "options", [{"kv_cache_tokens": 64}, {"max_rows": 2}, {"prefix_cache": False}]
)
def test_it_does_what_there_is_room_for(options: dict[str, Any]) -> None:
    max_rows = options.pop("max_rows", 64)
    engine, *_ = Recorded.of(tiny_triple(eos=()), max_rows=max_rows, **options)
    engine.warm_up()
    assert_all_pages_free(engine)


def test_a_model_that_gives_nan_is_left_to_the_requests() -> None:
    models = tiny_triple(eos=(), instance="broken later")
    engine, *_ = Recorded.of(models)
    with torch.no_grad():
        weight = models[1].get_output_embeddings().weight
        kept = weight.clone()
        weight.fill_(torch.nan)
    try:
        engine.warm_up()
        assert_all_pages_free(engine)
        with pytest.raises(NumericalError):
            engine.generate(LONG_PROMPTS[:1], SEARCH)
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_where_nothing_is_recorded_nothing_is_run() -> None:
    engine = make_engine(*tiny_triple(eos=()))
    with mock.patch.object(Search, "step", side_effect=AssertionError("run")):
        engine.warm_up()
    alone = Engine(tiny_model("llama"), device="cpu", kv_cache_tokens=64)
    alone.warm_up()
