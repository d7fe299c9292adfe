"""What the host does for a recorded pass and for recorded steps: a copy, and replays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.contents import assert_recomputed
from tests.support.engines import (
    PROMPTS,
    SEARCH,
    make_engine,
)
from tests.support.engines import (
    found as search_results,
)
from tests.support.recorded import (
    Recorded,
    columns,
    record_missed,
    replays,
    settings,
    unrecorded_steps,
)
from tests.support.recorder import Recording, tensors
from tests.support.tiny_models import tiny_triple
from w2s_fast.attention.row_tree import Level, RowTree
from w2s_fast.cache import Int32Array, as_int32
from w2s_fast.decoding.decoder import Decoder
from w2s_fast.decoding.growing_rows import GrowingRows
from w2s_fast.models import PagedModel
from w2s_fast.models.body import run_body


class Launches(TorchDispatchMode):
    """Names of the operators that would launch or copy something on a device, and of replays."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        places = [{t.untyped_storage().data_ptr() for t in tensors(x)} for x in (args, out)]
        is_view = places[1] <= places[0] and not func._schema.is_mutable
        if not is_view and name != "empty":
            of_bytes = name == "copy_" and args[1].dtype == torch.uint8
            self.found.append("staging" if of_bytes else name)
        return out


@contextmanager
def launches() -> Iterator[list[str]]:
    """What is launched meanwhile; what a recording repeats is one replay."""
    replay = Recording.__call__
    log = Launches()

    def replayed(self: Recording) -> None:
        before = len(log.found)
        replay(self)
        log.found[before:] = ["replay"]

    with mock.patch.object(Recording, "__call__", replayed), log:
        yield log.found


@pytest.mark.parametrize("as_tensor", [True, False])
def test_a_recorded_pass_is_one_copy_and_one_replay(as_tensor: bool) -> None:
    engine, *_ = Recorded.of(tiny_triple(eos=()), max_rows=8)
    model = engine.base
    slots = model.pool.allocate(2)
    tokens = torch.tensor([3, 1, 4]) if as_tensor else [3, 1, 4]
    for _ in range(2):
        model.forward(slots, tokens, [2, 1])
    record_missed(engine)
    with launches() as found:
        model.forward(slots, tokens, [2, 1])
    assert found == ["staging", "replay", "clone"]


def test_a_recorded_decode_is_one_copy_and_a_replay_a_step() -> None:
    engine, *_ = Recorded.of(tiny_triple(eos=()), max_rows=8)
    model = engine.base
    root = model.pool.allocate(1)
    model.forward(root, list(range(1, 13)), [12])
    slots = [*root, *model.pool.fork(root, [2])]
    tree = RowTree.of([Level([0] * 3, [12] * 3)], 3)
    model.pool.reserve(slots, [5] * 3)  # a shared page is copied here
    logits = torch.randn(3, engine._models.vocab_size)
    with launches() as found:
        rows = [GrowingRows(slots, tree)]
        drawn = engine._search.base.expansion.decoder.run(rows, settings(3), None, [logits], 6)
    assert found == ["staging", "sample_tokens", "copy_", "copy_", *["replay"] * 5]
    tokens, logprobs = drawn.tokens.numpy(), drawn.logprobs.numpy()
    assert tokens.shape == logprobs.shape == (6, 3)
    for step, draw in enumerate(drawn):
        assert draw.tokens.tolist() == tokens[step].tolist()
        assert draw.logprobs.tolist() == logprobs[step].tolist()
    assert model.pool.lengths(slots).tolist() == [17] * 3
    # The same, a step after the other and without recordings.
    model.pool.truncate(slots, [12] * 3)
    plain = Decoder([model], engine._models.vocab_size)
    again = plain.run([GrowingRows(slots, tree)], settings(3), None, [logits], 6)
    assert (again.tokens.numpy() == tokens).all()
    torch.testing.assert_close(again.logprobs, torch.from_numpy(logprobs))


def forked(model: PagedModel, text: list[int], rows: int) -> tuple[list[int], Int32Array]:
    """``rows`` slots that hold a text, and the pages that are still to be copied for them."""
    root = model.pool.allocate(1)
    model.forward(root, text, [len(text)])
    children, copies = model.pool.manager.fork(root, as_int32([rows - 1]))
    assert len(copies) == (rows - 1 if len(text) % model.pool.page_size else 0)
    return [*root.tolist(), *children.tolist()], copies


@pytest.mark.parametrize("as_tensor", [True, False])
def test_page_copies_travel_with_a_pass(as_tensor: bool) -> None:
    models = tiny_triple(eos=())
    engine, *_ = Recorded.of(models, max_rows=8)
    model, other = engine.base, make_engine(*models).base
    text, counts = list(range(1, 15)), [2, 1, 3]
    tokens = [[5, 6], [7], [8, 9, 10]]
    flat = [token for own in tokens for token in own]
    tree = RowTree.of([Level([0] * 3, [len(text)] * 3)], 3)

    def run(rows: int) -> list[str]:
        slots, copies = forked(model, text, rows)
        new = flat[: sum(counts[:rows])]
        with launches() as found:
            model.forward(
                slots,
                torch.tensor(new) if as_tensor else new,
                counts[:rows],
                tree if rows == 3 else None,
                copies,
            )
        for slot, own in zip(slots, tokens):
            assert_recomputed(model, slot, text + own, other)
        model.pool.release(slots)
        return found

    for rows in (3, 2):  # without a recording, on its tensors
        for _ in range(2):
            assert run(rows)[:2] == ["staging", "copy_pages"]
    record_missed(engine)
    for rows in (3, 2, 1, 3):  # of a larger pass nothing is left to be copied
        assert run(rows)[0] == "staging"
    assert run(3) == run(2) == ["staging", "replay", "clone"]


def test_page_copies_that_cannot_be_recorded_come_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA where the library of csrc/ was not built."""
    monkeypatch.setattr("w2s_fast.attention.static_plan.is_one_launch", lambda kv: False)
    models = tiny_triple(eos=())
    engine, *_ = Recorded.of(models, max_rows=8)
    model, other = engine.base, make_engine(*models).base
    text, tokens = list(range(1, 15)), [5, 6, 7]
    for turn in range(4):
        slots, copies = forked(model, text, 3)
        with launches() as found:
            model.forward(slots, tokens, [1] * 3, copies=copies)
        assert found[:2] == ["staging", "copy_pages"]
        for slot, token in zip(slots, tokens):
            assert_recomputed(model, slot, [*text, token], other)
        model.pool.release(slots)
        if turn == 1:
            record_missed(engine)
    assert found == ["staging", "copy_pages", "replay", "clone"]
    params = replace(SEARCH, beam_width=2, successors=2, chunk_length=3, max_new_tokens=9)
    expected = search_results(make_engine(*models).generate(PROMPTS, params))
    for _ in range(3):
        assert search_results(engine.generate(PROMPTS, params)) == expected


def test_page_copies_travel_with_a_decode() -> None:
    models = tiny_triple(eos=())
    engine, *_ = Recorded.of(models, max_rows=8)
    model, other = engine.base, make_engine(*models).base
    text = list(range(1, 15))
    for rows in (3, 2, 3):
        slots, copies = forked(model, text, rows)
        tree = RowTree.of([Level([0] * rows, [len(text)] * rows)], rows)
        logits = torch.randn(rows, engine._models.vocab_size)
        decoder = engine._search.base.expansion.decoder
        with launches() as found:
            own = [GrowingRows(slots, tree, copies)]
            drawn = decoder.run(own, settings(rows), None, [logits], 6)
        assert found == [
            *("staging", "copy_pages", "sample_tokens", "copy_", "copy_"),
            *["replay"] * 5,
        ]
        tokens = drawn.tokens.numpy()
        for slot, own in zip(slots, tokens.T.tolist()):
            assert_recomputed(model, slot, text + own[:-1], other)
        model.pool.release(slots)


def test_more_steps_than_are_kept_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("w2s_fast.decoding.decode_graphs._STEPS", 4)
    models = tiny_triple(eos=())
    engine, *_ = Recorded.of(models, max_rows=8)
    for chunk in (4, 5, 6, 13):
        long = replace(SEARCH, beam_width=2, successors=2, chunk_length=chunk, max_new_tokens=26)
        with unrecorded_steps() as unrecorded:
            results = engine.generate(PROMPTS[:1], long)
        assert not unrecorded
        assert search_results(results) == search_results(
            make_engine(*models).generate(PROMPTS[:1], long)
        )


def test_a_shape_runs_on_the_same_tensors_before_it_is_recorded() -> None:
    """In half precision other shapes may give other bits: the first run is the later ones'."""
    engine, _, passes = Recorded.of(tiny_triple(eos=()), max_rows=8)
    model, graphs = engine.guides[0].models[0], passes[1]
    shapes: list[int] = []
    before, hidden = len(graphs.recordings), []

    def run(view: Any, tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
        shapes.append(len(tokens))
        return run_body(view, tokens, *rest)

    with mock.patch("w2s_fast.decoding.pass_graphs.run_body", run):
        for recorded in (0, 1, 1):
            slots = model.pool.allocate(3)
            hidden.append(model.forward(slots, torch.arange(1, 20), [9, 4, 6]))
            model.pool.release(slots)
            record_missed(engine)
            assert len(graphs.recordings) == before + recorded
    assert shapes == [20, 20, 20]  # run twice, recorded once
    assert torch.equal(hidden[0], hidden[1]) and torch.equal(hidden[0], hidden[2])


@pytest.mark.parametrize("counts", [[30, 30, 30], [30, 4, 17], [64, 1, 1]])
def test_rows_of_many_new_tokens_are_recorded(counts: list[int]) -> None:
    engine, _, passes = Recorded.of(tiny_triple(eos=()), max_rows=8)
    model = engine.guides[0].models[0]
    root = model.pool.allocate(1)
    model.forward(root, list(range(1, 13)), [12])
    slots = [*root, *model.pool.fork(root, [2])]
    tree = RowTree.of([Level([0] * 3, [12] * 3)], 3)
    tokens = torch.arange(sum(counts)) % 18 + 1

    def run() -> torch.Tensor:
        hidden = model.forward(slots, tokens, counts, tree)
        model.pool.truncate(slots, [12] * 3)
        return hidden

    before = replays(passes[1])
    found = [run() for _ in range(2)]
    assert replays(passes[1]) == before
    record_missed(engine)
    found += [run() for _ in range(2)]
    assert replays(passes[1]) == before + 2
    model.replays = None
    for hidden in found:
        torch.testing.assert_close(hidden, run())


def test_longer_rows_are_not_recorded() -> None:
    engine, _, passes = Recorded.of(tiny_triple(eos=()), max_rows=8)
    model, before = engine.base, len(passes[0].recordings)
    for _ in range(3):
        slots = model.pool.allocate(1)
        model.forward(slots, torch.ones(65, dtype=torch.int64), [65])
        model.pool.release(slots)
    assert len(passes[0].recordings) == before


def test_settings_of_rows_travel_in_their_own_precision() -> None:
    expected = {
        "temperature": (torch.float32, [0.5, 0.0, 0.5]),
        "top_k": (torch.int64, [7, 0, 7]),
        "top_p": (torch.float64, [0.1, 1.0, 0.1]),
        "min_p": (torch.float64, [0.3, 0.0, 0.3]),
        "seed": (torch.int64, [-3, 5, -3]),
        "candidate": (torch.int64, [4, 5, 6]),
        "position": (torch.int64, [7, 8, 2**40]),
    }
    batch = columns(**{name: values for name, (_, values) in expected.items()})
    there = batch.to(torch.device("cpu"))
    there.advance()
    for name, (dtype, values) in expected.items():
        column = getattr(there, name)
        assert column.dtype == dtype and column.data_ptr() % 16 == 0
        assert column.tolist() == [v + (name == "position") for v in values]
        assert getattr(batch, name).tolist() == values
