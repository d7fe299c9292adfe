"""Recorded decoding steps: the same tokens, the same pages, whatever the bucket.

What records here repeats operator calls on the tensors they were made on, as a CUDA graph does,
and runs on the CPU. CUDA graphs themselves are tested in tests/gpu.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

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
    settings,
    unrecorded_passes,
    unrecorded_steps,
)
from tests.support.recorder import Recording
from tests.support.tiny_models import byte_tokenizer, tiny_triple
from tests.support.tokenizers import with_gaps
from w2s_fast.attention.row_tree import RowTree
from w2s_fast.attention.static_plan import Bucket
from w2s_fast.decoding.decoding import Decoding
from w2s_fast.decoding.graphs import Recordings
from w2s_fast.decoding.growing_rows import GrowingRows
from w2s_fast.scheduling import Scheduler
from w2s_fast.search import Request, Search
from w2s_fast.search.score_graphs import _Scoring


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("prompts", [PROMPTS, RAGGED_PROMPTS])
def test_a_search_from_recordings_finds_the_same(family: str, prompts: list[list[int]]) -> None:
    layers = 2 if family == "gemma2" else 1  # whose layers differ
    models = tiny_triple((family, "llama", "gpt2"), layers=layers, eos=(0, 6, 13))
    expected = found(make_engine(*models).generate(prompts, MIXED))
    made = Recorded.of(models)
    engine, steps, _ = made
    with unrecorded_steps() as unrecorded:
        assert found(engine.generate(prompts, MIXED)) == expected
    assert not unrecorded and replays(steps) >= 5
    # Shapes are recorded when they have come twice, and with cached prompts others come.
    for _ in range(2):
        assert found(engine.generate(prompts, MIXED)) == expected
    before = [replays(graphs) for graphs in made.rounds]
    with unrecorded_passes() as unrecorded:
        assert found(engine.generate(prompts, MIXED)) == expected
    assert not unrecorded
    assert all(replays(graphs) > count for graphs, count in zip(made.rounds, before, strict=True))
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

    def chosen(self: Scheduler, *others: Any) -> Any:
        if request in self.waiting:
            self.waiting.remove(request)
            try:
                return choose(self, *others)
            finally:
                self.waiting.append(request)
        return choose(self, *others)

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
    made = Recorded.of(models, max_rows=8)
    engine, graphs_of_a_round = made.engine, (made.steps, *made.rounds)
    for _ in range(2):
        engine.generate(RAGGED_PROMPTS[:1], SEARCH)
    assert all(recorded(graphs) for graphs in graphs_of_a_round)
    before = [recorded(graphs) for graphs in graphs_of_a_round]
    for model in models:
        for weight in model.parameters():
            weight.data = weight.data * 0.7 if moved else weight.data.mul_(0.7)
    engine.weights_changed()
    expected = found(make_engine(*models).generate(RAGGED_PROMPTS[:1], SEARCH))
    for _ in range(3):
        assert found(engine.generate(RAGGED_PROMPTS[:1], SEARCH)) == expected
    for old, graphs in zip(before, graphs_of_a_round):
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
    assert steps.run([GrowingRows(many, nothing[8])], settings(8), None, [logits], 7) is not None
    chunk.count(6)

    Decoding(engine.base, slots, 6)
    written = pool.places(slots, [6] * 5)
    before = pool.kv.clone().flatten(2, 3)
    drawn = steps.run([GrowingRows(slots, nothing[5])], settings(5), None, [logits[:5]], 7)
    assert drawn is not None and len(drawn) == 7
    assert places_written(before) == sorted(written.tolist())
    assert drawn.logprobs.isfinite().all()


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


def test_guides_that_cannot_be_recorded_together_are_named_and_go_on() -> None:
    """Each model of theirs can, by itself."""
    models = tiny_triple(eos=())

    def record(run: Any) -> Recording:
        if isinstance(run.__self__, _Scoring):
            raise RuntimeError("two streams at once")
        return Recording(run)

    with pytest.warns(UserWarning, match="tuned and untuned do not run in one CUDA graph: .* two "):
        made = Recorded.of(models, recorder=record)
    expected = found(make_engine(*models).generate(RAGGED_PROMPTS, MIXED))
    before = [replays(passes) for passes in made.passes[1:]]
    for _ in range(3):
        assert found(made.engine.generate(RAGGED_PROMPTS, MIXED)) == expected
    firsts, scores = made.rounds
    assert replays(firsts) > 0 and not len(scores)
    assert all(replays(p) > count for p, count in zip(made.passes[1:], before))


def test_rounds_of_too_many_candidates_are_selected_without_a_recording(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch selects those, and asks the host."""
    monkeypatch.setattr("w2s_fast.search.score_graphs.MAX_CANDIDATES", 3)
    models = tiny_triple(eos=())
    made = Recorded.of(models)
    params = replace(SEARCH, beam_width=2, successors=2)
    for _ in range(3):
        results = made.engine.generate(RAGGED_PROMPTS, params)
    assert found(results) == found(make_engine(*models).generate(RAGGED_PROMPTS, params))
    assert not len(made.rounds[1]) and replays(made.rounds[0]) > 0
