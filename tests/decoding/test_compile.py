"""Recorded passes through torch.compile: the same tokens, the same pages, few compilations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.utils import (
    clear_compilation_metrics,
    counters,
    get_compilation_metrics,
)

from tests.support.contents import contents
from tests.support.engines import MIXED, RAGGED_PROMPTS, found, make_engine, models_of
from tests.support.tiny_models import tiny_model, tiny_triple
from w2s_fast.attention.kernel import KernelPlan
from w2s_fast.attention.row_tree import Level, RowTree
from w2s_fast.decoding.record import record_passes
from w2s_fast.errors import InvalidRequest, UnsupportedModel
from w2s_fast.models.model import PagedModel


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> None:
    torch.compiler.reset()
    counters.clear()
    clear_compilation_metrics()


def as_it_is(run: Callable[[], None]) -> Callable[[], None]:
    """No recording: the same code again. What is compiled is tested here, not what is replayed."""
    return run


def record(base: PagedModel, guides: list[PagedModel], vocab_size: int) -> Any:
    for model in (base, *guides):
        model.backend = KernelPlan
    return record_passes(
        base,
        guides,
        vocab_size=vocab_size,
        max_rows=32,
        compile=True,
        recorder_for=lambda _: as_it_is,
    )


@pytest.mark.long
@pytest.mark.thorough
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_compiled_search_finds_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and put together again, without the compiler behind it, which takes its time."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    # What one layer does to the next is the same in all models: the base has two.
    base = tiny_model(family, eos=(0, 6, 13))
    models = (base, *tiny_triple(("llama", "gpt2", "llama"), layers=1)[1:])
    engine = make_engine(*models)
    # The guides of both families are the same: one is compiled with the first.
    compiled = models_of(engine)[:2] if family == "llama" else [engine.base]
    engine._search.base.expansion.decoder.graphs = record(
        engine.base, compiled[1:], engine._models.vocab_size
    ).alone
    expected = found(make_engine(*models).generate(RAGGED_PROMPTS, MIXED))
    for _ in range(2):
        assert found(engine.generate(RAGGED_PROMPTS, MIXED)) == expected
    assert not counters["graph_break"]
    # Of each model: one token, one row of several, many rows; of Gemma 2, some twice. Not one for
    # each bucket.
    assert 0 < counters["stats"]["unique_graphs"] <= 6
    # Nor is any traced a second time for a number of the model's own that never varies; of Gemma 2
    # one is.
    again = ["Scalar" in str(one.restart_reasons) for one in get_compilation_metrics()]
    assert sum(again) <= (family == "gemma2")


@pytest.mark.long
def test_the_compiler_writes_every_layer_to_its_own_place() -> None:
    """As torch 2.13 does not where the shape of the pages may vary."""
    model = PagedModel(tiny_model("gpt2", dtype=torch.float32), kv_cache_tokens=512, page_size=4)
    record(model, [], model.vocab_size)
    compiled, model.replays = model.replays, None
    (root,) = model.pool.allocate(1)
    model.forward([root], torch.arange(12), [12])
    slots = [root, *model.pool.fork([root], [2]).tolist()]
    tree = RowTree.of([Level([0] * 3, [12] * 3)], 3)

    def passed() -> list[torch.Tensor]:
        counts = [2, 1, 3]
        model.pool.truncate(slots, [12] * 3)
        hidden = model.forward(slots, torch.tensor([3, 1, 4, 1, 5, 9]), counts, tree)
        return [hidden, *(contents(model, slot, 12 + new) for slot, new in zip(slots, counts))]

    expected = passed()
    model.replays = compiled
    for _ in range(2):  # the second time from fixed tensors
        for ours, theirs in zip(passed(), expected):
            torch.testing.assert_close(ours, theirs)


def test_a_compiled_model_that_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = PagedModel(tiny_model("llama"), kv_cache_tokens=512, page_size=4)

    def compile(body: torch.nn.Module, **_: Any) -> Any:
        def wrong(**inputs: Any) -> Any:
            out = body(**inputs)
            out.last_hidden_state = -out.last_hidden_state
            return out

        return wrong

    monkeypatch.setattr(torch, "compile", compile)
    with pytest.raises(UnsupportedModel, match=r"differ from its own eager .* with compile=False"):
        record(model, [], model.vocab_size)


def test_compilation_is_refused_where_nothing_is_recorded() -> None:
    for options in ({}, {"attention": "torch"}, {"cuda_graphs": False}):
        with pytest.raises(InvalidRequest, match="compile=True needs recorded passes"):
            make_engine(*tiny_triple(), compile=True, **options)
