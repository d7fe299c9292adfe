"""Recorded decoding steps: the same tokens, the same pages, whatever the bucket.

What records here repeats operator calls on the tensors they were made on, as a CUDA graph does,
and runs on the CPU. CUDA graphs themselves are tested in tests/gpu.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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
from tests.support.recorder import Recording
from tests.support.tiny_models import byte_tokenizer, tiny_triple
from tests.support.tokenizers import with_gaps
from w2s_fast import Engine
from w2s_fast.attention.kernel import KernelPlan
from w2s_fast.attention.static_plan import Bucket
from w2s_fast.decoding.decode_graphs import DecodeGraphs
from w2s_fast.decoding.decoding import Decoding
from w2s_fast.decoding.graphs import Recordings, round_up_rows, rows_recorded
from w2s_fast.decoding.pass_graphs import PassGraphs
from w2s_fast.decoding.record import record_passes
from w2s_fast.decoding.sampling import SamplingBatch
from w2s_fast.kernels.paged_attention import SharedSegments
from w2s_fast.scheduling import Scheduler
from w2s_fast.search import Request, Search


class Recorded(NamedTuple):
    """An engine whose models run the operators' own CPU paths, from recordings."""

    engine: Engine
    steps: DecodeGraphs
    passes: list[PassGraphs]

    @classmethod
    def of(cls, models: Any, max_rows: int = 64, compile: bool = False, **options: Any) -> Recorded:
        engine = make_engine(*models, **options)
        for model in models_of(engine):
            model.backend = KernelPlan
        steps = record_passes(
            engine.base,
            models_of(engine)[1:],
            vocab_size=engine._models.vocab_size,
            max_rows=max_rows,
            compile=compile,
            recorder_for=lambda _: Recording,
        )
        engine._search.base.decoder.graphs = steps
        return cls(engine, steps, [model.replays for model in models_of(engine)])


def replays(graphs: DecodeGraphs | PassGraphs) -> int:
    """How often one of them was replayed."""
    return sum(recording.replays for recording in recorded(graphs))


def recorded(graphs: DecodeGraphs | PassGraphs) -> set[Any]:
    return {graphs.recordings[bucket].replay for bucket in graphs.recordings}


def steps_by_hand() -> Any:
    return mock.patch.object(Decoding, "step", autospec=True, side_effect=Decoding.step)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("prompts", [PROMPTS, RAGGED_PROMPTS])
def test_a_search_from_recordings_finds_the_same(family: str, prompts: list[list[int]]) -> None:
    models = tiny_triple((family, "llama", "gpt2"), eos=(0, 6, 13))
    expected = found(make_engine(*models).generate(prompts, MIXED))
    engine, steps, passes = Recorded.of(models)
    with steps_by_hand() as by_hand:
        assert found(engine.generate(prompts, MIXED)) == expected
    assert by_hand.call_count == 0 and replays(steps) >= 5
    # Shapes are recorded when they have come twice, and with cached prompts others come.
    for _ in range(2):
        assert found(engine.generate(prompts, MIXED)) == expected
    before = [replays(graphs) for graphs in passes]
    with mock.patch("w2s_fast.models.model.run_body", side_effect=AssertionError("not recorded")):
        assert found(engine.generate(prompts, MIXED)) == expected
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
        with steps_by_hand() as by_hand:
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
    engine, steps, passes = Recorded.of(tiny_triple(eos=()), max_rows=8)
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
    for _ in range(3):  # without a recording, and then with it
        pool.reserve(slots, lengths)
        written = pool.places(slots, lengths)
        before = pool.kv.clone().flatten(2, 3)
        hidden = engine.base.forward(slots, torch.arange(sum(lengths)) % 18 + 1, lengths)
        assert hidden.isfinite().all()
        assert places_written(before) == sorted(written.tolist())
    assert replays(passes[0]) == 2

    # All rows of the bucket, for longer than a page, so that there is something to leave behind.
    many = pool.allocate(8)
    engine.base.forward(many, torch.arange(8), [1] * 8)
    chunk = Decoding(engine.base, many, 6)
    assert steps.run(chunk.plan, settings(8), torch.arange(8), 6) is not None
    chunk.count(6)

    decoding = Decoding(engine.base, slots, 6)
    written = pool.places(slots, [6] * 5)
    before = pool.kv.clone().flatten(2, 3)
    drawn = steps.run(decoding.plan, settings(5), torch.tensor([1, 2, 3, 4, 5]), 6)
    assert drawn is not None and len(drawn) == 6
    assert places_written(before) == sorted(written.tolist())
    assert all(logprobs.isfinite().all() for _, logprobs in drawn)


def settings(rows: int) -> SamplingBatch:
    sampling = SamplingBatch.empty(rows, torch.device("cpu"))
    sampling.temperature.fill_(0.8)
    sampling.top_p.fill_(0.9)
    sampling.candidate.copy_(torch.arange(rows))
    return sampling


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


# Buckets


def plan_of(
    rows: int, max_q: int, shared: tuple[int, int, int, int] | None, max_k: int
) -> KernelPlan:
    """A plan of these bounds: splits, max_tokens, max_parts, max_own."""
    nothing = torch.zeros(0)
    splits, *bounds = shared or (0, 0, 0, 0)
    segments = SharedSegments(nothing, nothing, nothing, torch.zeros(splits, 6), *bounds)
    return KernelPlan(
        pool=mock.sentinel.pool,
        page_table=nothing,
        positions=nothing,
        write=nothing,
        lengths=torch.zeros(rows),
        cu_seqlens_q=nothing,
        max_q=max_q,
        max_k=max_k,
        shared=None if shared is None else segments,
    )


@given(
    rows=st.integers(1, 256),
    max_q=st.integers(1, 16),
    shared=st.none() | st.tuples(*[st.integers(1, 5000)] * 4),
    max_k=st.integers(1, 20000),
)
def test_a_bucket_is_never_too_small(
    rows: int, max_q: int, shared: tuple[int, int, int, int] | None, max_k: int
) -> None:
    padded = round_up_rows(rows, 256)
    bucket = Bucket.of(plan_of(rows, max_q, shared, max_k), padded, padded * max_q)
    wanted = (rows, rows * max_q, max_q, *(shared or (0, 0, 0, max_k)))
    assert all(have >= want for have, want in zip(bucket, wanted, strict=True))
    # Not much too large either, once past the smallest.
    smallest = Bucket.smallest(padded, padded * max_q, bucket.max_q)
    assert bucket.max_q < 2 * max_q
    assert all(
        have < 4 * want or have == least
        for have, want, least in zip(bucket[3:], wanted[3:], smallest[3:], strict=True)
    )


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
    with steps_by_hand() as by_hand:
        for count in (1, 2, 4):
            prompts = [[(p + i) % 18 + 1 for p in range(80)] for i in range(count)]
            engine.generate(prompts, wide)
    assert by_hand.call_count == 0 and len(steps.recordings) == before
    assert {b.rows for b in steps.recordings if steps.recordings[b].replay.replays} == {16, 32, 64}  # type: ignore[attr-defined]
