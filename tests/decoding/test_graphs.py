"""Recorded decoding steps: the same tokens, the same pages, whatever the bucket.

What records here repeats operator calls on the tensors they were made on, as a CUDA graph does,
and runs on the CPU. CUDA graphs themselves are tested in tests/gpu.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.contents import assert_recomputed
from tests.support.engines import (
    MIXED,
    PROMPTS,
    RAGGED_PROMPTS,
    SEARCH,
    assert_all_pages_free,
    found,
    make_engine,
    models_of,
)
from tests.support.recorded import (
    Recorded,
    record_missed,
    recorded,
    replays,
    unrecorded_passes,
    unrecorded_steps,
)
from tests.support.recorder import Recording, tensors
from tests.support.tiny_models import byte_tokenizer, tiny_triple
from tests.support.tokenizers import with_gaps
from w2s_fast.attention.kernel import Bounds
from w2s_fast.attention.row_tree import Level, RowTree
from w2s_fast.attention.staging import _NUMPY
from w2s_fast.attention.static_plan import Bucket
from w2s_fast.cache import Int32Array, as_int32
from w2s_fast.decoding.decoder import Decoder
from w2s_fast.decoding.decoding import Decoding
from w2s_fast.decoding.graphs import Recordings, round_up_rows, rows_recorded
from w2s_fast.decoding.sampling import SamplingColumns, sampling_fields
from w2s_fast.kernels.paged_attention_triton import SPLIT_QUERIES
from w2s_fast.models import PagedModel
from w2s_fast.models.body import run_body
from w2s_fast.scheduling import Scheduler
from w2s_fast.search import Request, Search


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("prompts", [PROMPTS, RAGGED_PROMPTS])
def test_a_search_from_recordings_finds_the_same(family: str, prompts: list[list[int]]) -> None:
    models = tiny_triple((family, "llama", "gpt2"), eos=(0, 6, 13))
    expected = found(make_engine(*models).generate(prompts, MIXED))
    engine, steps, passes = Recorded.of(models)
    with unrecorded_steps() as unrecorded:
        assert found(engine.generate(prompts, MIXED)) == expected
    assert not unrecorded and replays(steps) >= 5
    # Shapes are recorded when they have come twice, and with cached prompts others come.
    for _ in range(2):
        assert found(engine.generate(prompts, MIXED)) == expected
    before = [replays(graphs) for graphs in passes]
    with unrecorded_passes() as unrecorded:
        assert found(engine.generate(prompts, MIXED)) == expected
    assert not unrecorded
    assert all(replays(graphs) > count for graphs, count in zip(passes, before, strict=True))
    for model in models_of(engine):
        model.pool.drop_cache()
    assert_all_pages_free(engine)


def test_recorded_steps_leave_out_ids_that_are_no_tokens() -> None:
    gaps = set(range(3, 250, 2))
    models = tiny_triple(vocab_size=258, eos=(257,))
    tokenizer = with_gaps(byte_tokenizer(), *gaps)
    params = replace(SEARCH, temperature=2.0, trace=False)
    expected = found(make_engine(*models, tokenizer=tokenizer).generate([[2, 4]], params))
    engine, steps, _ = Recorded.of(models, tokenizer=tokenizer)
    results = engine.generate([[2, 4]], params)
    assert found(results) == expected and replays(steps) > 0
    assert not gaps.intersection(t for h in results[0].hypotheses for t in h.token_ids)


def test_a_shape_is_recorded_when_it_comes_again() -> None:
    engine, steps, _ = Recorded.of(tiny_triple(eos=()))
    large = replace(SEARCH, beam_width=20, successors=1, max_new_tokens=3, n=1)  # splits: 21
    before = len(steps.recordings)
    for new in (0, 1, 1):
        engine.generate([RAGGED_PROMPTS[0]], large)
        assert len(steps.recordings) == before + new


def test_nothing_is_recorded_in_the_middle_of_a_step() -> None:
    """But after it, when nobody waits any more."""
    engine, *_ = Recorded.of(tiny_triple(eos=()))
    recorded = [own for model in models_of(engine) for own in model.recorded]
    within, between = [], []

    def watched(self: Any, requests: Any) -> None:
        before = [len(own) for own in recorded]
        step(self, requests)
        within.append([len(own) for own in recorded] == before)

    def waited(self: Recordings[Any], bucket: Bucket) -> None:
        between.append(engine.stats().running + engine.stats().waiting)
        make(self, bucket)

    step, make = Search.step, Recordings.make
    with mock.patch.object(Search, "step", watched), mock.patch.object(Recordings, "make", waited):
        for _ in range(2):
            engine.generate(RAGGED_PROMPTS, MIXED)
    assert len(within) > 5 and all(within)
    assert len(between) > 5 and not any(between)


def test_while_others_wait_one_is_recorded_at_a_time_if_it_is_missed_often() -> None:
    engine, *_ = Recorded.of(tiny_triple(eos=()))
    recorded = [own for model in models_of(engine) for own in model.recorded]
    made: list[tuple[int, int]] = []

    def counted(self: Recordings[Any], least: int) -> bool:
        times = max(self._missed.values(), default=0)
        if done := record_missed(self, least):
            made.append((engine.stats().steps, times))
        return done

    record_missed = Recordings.record_missed
    # As on a server whose queue is never empty.
    waiting = engine.make_request([1], SEARCH, priority=10**6)
    with (
        mock.patch.object(Recordings, "record_missed", counted),
        mock.patch.object(Scheduler, "choose", without(waiting)),
    ):
        engine.runner.submit(waiting)
        engine.generate(RAGGED_PROMPTS[:1], replace(SEARCH, max_new_tokens=90))
        engine.generate(RAGGED_PROMPTS[:3], SEARCH)
    assert len(made) > 1 and all(times >= 16 for _, times in made)
    assert len({step for step, _ in made}) == len(made)
    assert any(1 < times < 16 for own in recorded for times in own._missed.values())
    while not waiting.ended:
        engine.runner.advance([waiting])
    assert all(times == 1 for own in recorded for times in own._missed.values())


def without(request: Request) -> Any:
    """Scheduler.choose that does not see a request."""
    choose = Scheduler.choose

    def chosen(self: Scheduler) -> Any:
        if request in self.waiting:
            self.waiting.remove(request)
            try:
                return choose(self)
            finally:
                self.waiting.append(request)
        return choose(self)

    return chosen


def test_more_than_any_bucket_holds_is_run_without() -> None:
    models = tiny_triple(eos=())
    engine, *_ = Recorded.of(models, max_rows=4)
    for _ in range(2):
        with mock.patch.object(
            Decoding, "step", autospec=True, side_effect=Decoding.step
        ) as by_hand:
            results = engine.generate(PROMPTS, SEARCH)
        assert by_hand.call_count > 0
        assert found(results) == found(make_engine(*models).generate(PROMPTS, SEARCH))


@pytest.mark.parametrize("moved", [True, False])
def test_recordings_of_weights_that_moved_are_dropped(moved: bool) -> None:
    models = copy.deepcopy(tiny_triple(eos=()))
    engine, steps, passes = Recorded.of(models, max_rows=8)
    for _ in range(2):
        engine.generate(RAGGED_PROMPTS[:1], SEARCH)
    assert len(steps.recordings) and all(len(p.recordings) for p in passes)
    before = [recorded(graphs) for graphs in (steps, *passes)]
    for model in models:
        for weight in model.parameters():
            weight.data = weight.data * 0.7 if moved else weight.data.mul_(0.7)
    engine.weights_changed()
    expected = found(make_engine(*models).generate(RAGGED_PROMPTS[:1], SEARCH))
    for _ in range(3):
        assert found(engine.generate(RAGGED_PROMPTS[:1], SEARCH)) == expected
    for old, graphs in zip(before, (steps, *passes)):
        new = recorded(graphs)
        assert any(recording.replays for recording in new)
        assert old.isdisjoint(new) if moved else old <= new


def test_there_is_an_end_to_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("w2s_fast.decoding.graphs._MOST_RECORDINGS", 2)
    models = tiny_triple(eos=())
    engine, steps, passes = Recorded.of(models, max_rows=8)
    assert [bucket.rows for bucket in steps.recordings] == [8, 4]
    narrow = replace(SEARCH, beam_width=1, successors=2, n=1)
    for _ in range(3):
        results = engine.generate(RAGGED_PROMPTS[:1], narrow)
        assert found(results) == found(make_engine(*models).generate(RAGGED_PROMPTS[:1], narrow))
    assert len(steps.recordings) == 2 and all(len(p.recordings) <= 2 for p in passes)


def test_a_model_that_cannot_be_recorded_says_so_once_and_goes_on() -> None:
    """Mixtral's own code asks on the host which experts were chosen."""
    models = tiny_triple(("mixtral", "llama", "gpt2"), eos=())
    with pytest.warns(UserWarning, match="base runs without CUDA graphs: a pass of Mixtral"):
        engine, steps, _ = Recorded.of(models)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            results = engine.generate(RAGGED_PROMPTS, MIXED)
            assert found(results) == found(make_engine(*models).generate(RAGGED_PROMPTS, MIXED))
    assert not len(steps.recordings)


def test_what_a_bucket_has_too_many_touches_no_page() -> None:
    """Neither when it is recorded nor when it is replayed: rows of padding write nothing."""
    engine, steps, passes = Recorded.of(tiny_triple(eos=()), max_rows=32)
    pool = engine.base.pool
    pool.kv.fill_(torch.nan)
    steps.recordings._made.clear()
    steps.warm_up()
    assert pool.kv.isnan().all()
    slots = pool.allocate(5)

    def places_written(before: torch.Tensor) -> list[int]:
        after = pool.kv.flatten(2, 3)
        same = (before == after) | (before.isnan() & after.isnan())
        found: list[int] = (~same).flatten(3).any(-1).any(0).any(0).nonzero()[:, 0].tolist()
        return found

    lengths = [3, 8, 1, 4, 6]
    before_turns, recorded_before = replays(passes[0]), len(passes[0].recordings)
    for turn in range(3):  # without a recording, and then with it
        if turn == 2:
            before = pool.kv.clone().flatten(2, 3)
            record_missed(engine)
            assert not places_written(before)
        pool.reserve(slots, lengths)
        written = pool.places(slots, lengths)
        before = pool.kv.clone().flatten(2, 3)
        hidden = engine.base.forward(slots, torch.arange(sum(lengths)) % 18 + 1, lengths)
        assert hidden.isfinite().all()
        assert places_written(before) == sorted(written.tolist())
    assert len(passes[0].recordings) == recorded_before + 1
    assert replays(passes[0]) == before_turns + 1

    # All rows of the bucket, for longer than a page, so that there is something to leave behind.
    many = pool.allocate(8)
    engine.base.forward(many, torch.arange(8), [1] * 8)
    logits = torch.zeros(8, engine._models.vocab_size)
    nothing = [RowTree.of([], rows) for rows in range(9)]
    chunk = Decoding(engine.base, many, 6)
    assert steps.run(many, nothing[8], settings(8), logits, 7) is not None
    chunk.count(6)

    Decoding(engine.base, slots, 6)
    written = pool.places(slots, [6] * 5)
    before = pool.kv.clone().flatten(2, 3)
    drawn = steps.run(slots, nothing[5], settings(5), logits[:5], 7)
    assert drawn is not None and len(drawn) == 7
    assert places_written(before) == sorted(written.tolist())
    assert all(logprobs.isfinite().all() for _, logprobs in drawn)


def settings(rows: int) -> SamplingColumns:
    return columns(
        temperature=[0.8] * rows,
        top_k=[50] * rows,
        top_p=[0.9] * rows,
        min_p=[0.0] * rows,
        seed=[0] * rows,
        candidate=list(range(rows)),
        position=[0] * rows,
    )


def columns(**values: list[Any]) -> SamplingColumns:
    fields = sampling_fields(1)
    arrays = {name: np.array(v, _NUMPY[fields[name].dtype]) for name, v in values.items()}
    return SamplingColumns(**arrays)


def test_a_chunk_leaves_nothing_behind_for_the_next_one() -> None:
    """A larger batch first, then a smaller one in the same bucket: as if it came alone."""
    models = tiny_triple(eos=())
    engine, *_ = Recorded.of(models)
    for _ in range(2):
        engine.generate(RAGGED_PROMPTS[:2], replace(SEARCH, beam_width=4, successors=4))
    narrow = replace(SEARCH, beam_width=3, successors=3, seed=9)
    plain = make_engine(*models)
    assert found(engine.generate(RAGGED_PROMPTS[2:3], narrow)) == found(
        plain.generate(RAGGED_PROMPTS[2:3], narrow)
    )


# What the host does for a pass


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
        drawn = engine._search.base.decoder.run(slots, tree, settings(3), logits, 6)
    assert found == ["staging", "sample_tokens", "copy_", "copy_", *["replay"] * 5, "clone"]
    tokens, logprobs = drawn.read()
    assert tokens.shape == logprobs.shape == (6, 3)
    for step, draw in enumerate(drawn):
        assert draw.tokens.tolist() == tokens[step].tolist()
        assert draw.logprobs.tolist() == logprobs[step].tolist()
    assert model.pool.lengths(slots).tolist() == [17] * 3
    # The same, a step after the other and without recordings.
    model.pool.truncate(slots, [12] * 3)
    plain = Decoder(model, engine._models.vocab_size)
    again = plain.run(slots, tree, settings(3), logits, 6).read()
    assert (again[0] == tokens).all()
    torch.testing.assert_close(torch.from_numpy(again[1]), torch.from_numpy(logprobs))


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
        copied = ["copy_pages"] if rows > 1 else []
        assert run(rows)[: len(copied) + 1] == ["staging", *copied]
    assert run(3) == ["staging", "copy_pages", "replay", "clone"]
    assert run(2) == ["staging", "copy_pages", "replay", "clone"]


def test_page_copies_travel_with_a_decode() -> None:
    models = tiny_triple(eos=())
    engine, *_ = Recorded.of(models, max_rows=8)
    model, other = engine.base, make_engine(*models).base
    text = list(range(1, 15))
    for rows in (3, 2, 3):
        slots, copies = forked(model, text, rows)
        tree = RowTree.of([Level([0] * rows, [len(text)] * rows)], rows)
        logits = torch.randn(rows, engine._models.vocab_size)
        decoder = engine._search.base.decoder
        with launches() as found:
            drawn = decoder.run(slots, tree, settings(rows), logits, 6, copies)
        assert found == [
            *("staging", "copy_pages", "sample_tokens", "copy_", "copy_"),
            *["replay"] * 5,
            "clone",
        ]
        tokens, _ = drawn.read()
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
        assert found(results) == found(make_engine(*models).generate(PROMPTS[:1], long))


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


# Buckets


def bounds_of(rows: int, max_q: int, shared: tuple[int, int, int, int], pages: int) -> Bounds:
    """Bounds of a pass: splits, max_tokens, max_parts, max_own."""
    splits, max_tokens, max_parts, max_own = shared
    return Bounds(
        rows, rows * max_q, splits, pages, max_q, 16 * pages, max_own, max_tokens, max_parts
    )


@given(
    rows=st.integers(1, 1500),
    max_q=st.integers(1, 64),
    shared=st.tuples(*[st.integers(1, 5000)] * 4)
    | st.integers(0, 20000).map(lambda own: (0, 0, 0, own)),
    pages=st.integers(1, 3000),
    more_pages=st.integers(0, 3000),
)
def test_a_bucket_is_never_too_small(
    rows: int, max_q: int, shared: tuple[int, int, int, int], pages: int, more_pages: int
) -> None:
    padded = round_up_rows(rows, 1500)
    most = pages + more_pages
    bucket = Bucket.of(bounds_of(rows, max_q, shared, pages), padded, padded * max_q, most)
    wanted = (rows, rows * max_q, max_q, *shared, pages)
    assert all(have >= want for have, want in zip(bucket, wanted, strict=True))
    assert bucket.pages <= most
    # Not much too large either, once past the smallest.
    smallest = Bucket.smallest(padded, padded * max_q, bucket.max_q, most)
    assert bucket.max_q < 2 * max_q
    assert all(
        have < 4 * want or have == least or have == want == 0
        for have, want, least in zip(bucket[3:], wanted[3:], smallest[3:], strict=True)
    )
    if max_q > SPLIT_QUERIES and not shared[0]:
        assert bucket.splits == bucket.max_tokens == bucket.max_parts == 0


@given(rows=st.integers(1, 300), max_rows=st.integers(1, 300))
def test_numbers_of_rows(rows: int, max_rows: int) -> None:
    recorded = rows_recorded(max_rows)
    assert recorded == sorted(set(recorded)) and recorded[-1] == max_rows
    if rows <= max_rows:
        assert rows <= round_up_rows(rows, max_rows) <= max(2 * rows, rows + 31)


def test_the_usual_search_needs_the_smallest_buckets_only() -> None:
    """4 x 4 candidates a request; what was recorded at the start serves all their steps."""
    engine, steps, _ = Recorded.of(tiny_triple(eos=()))
    before = len(steps.recordings)
    wide = replace(SEARCH, beam_width=4, successors=4, chunk_length=5, max_new_tokens=40)
    with unrecorded_steps() as unrecorded:
        for count in (1, 2, 4):
            prompts = [[(p + i) % 18 + 1 for p in range(80)] for i in range(count)]
            engine.generate(prompts, wide)
    assert not unrecorded and len(steps.recordings) == before
    assert {b.rows for b in steps.recordings if steps.recordings[b].replay.replays} == {16, 32, 64}  # type: ignore[attr-defined]
