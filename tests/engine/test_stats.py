"""Statistics: what a request cost, how the engine is doing, and the progress bar of a batch."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any
from unittest import mock

import pytest

from tests.support.engines import MIXED, PROMPTS, SEARCH, engine, make_engine, models_of
from tests.support.tiny_models import tiny_triple
from w2s_fast import SearchParams
from w2s_fast.errors import NumericalError
from w2s_fast.search.expansion import Expansion
from w2s_fast.search.guide_side import GuideSide
from w2s_fast.search.search import Search
from w2s_fast.stats import PoolStats, RequestStats


def of(result: Any) -> RequestStats:
    stats = result.stats
    assert isinstance(stats, RequestStats)
    return stats


def test_the_times_of_a_request_lie_within_its_life() -> None:
    e = make_engine(*tiny_triple(eos=()))
    begin = time.perf_counter()
    (result,) = e.generate([PROMPTS[2]], SEARCH)
    wall = time.perf_counter() - begin
    one = of(result)
    times = (one.queue_s, one.prefill_s, one.decode_s, one.scoring_s)
    assert all(seconds > 0 for seconds in times)
    assert sum(times) <= wall
    assert e.stats().busy_s <= wall
    assert result.trace is not None
    assert one.rounds == len(result.trace.rounds) == 4
    assert one.set_aside == one.cached_tokens == 0


def test_a_plain_sample_spends_no_time_on_scores() -> None:
    (result,) = engine().generate([[1]], SearchParams(method="sample", max_new_tokens=3))
    assert of(result).scoring_s == 0.0
    assert of(result).prefill_s > 0.0
    assert of(result).rounds == 1


def test_phases_are_told_apart() -> None:
    """With a clock that only the phases move."""
    e = make_engine(*tiny_triple(eos=()))
    now = 0.0

    def taking(owner: type, name: str, seconds: float) -> Any:
        inner = getattr(owner, name)

        def slow(self: Any, *args: Any) -> Any:
            nonlocal now
            now += seconds * bool(args[0])  # nothing for no requests
            return inner(self, *args)

        return mock.patch.object(owner, name, slow)

    with (
        mock.patch("time.perf_counter", side_effect=lambda: now),
        taking(Expansion, "first_logits", 1.0),
        taking(Expansion, "_decode", 100.0),
        taking(GuideSide, "prefill", 10.0),
        taking(Search, "_score", 10_000.0),
    ):
        (result,) = e.generate([[1]], SEARCH)
    one = of(result)
    # Four rounds; the first logits are the prompt's, those of later rounds belong to decoding.
    assert one.prefill_s == 1.0 + 10.0
    assert one.decode_s == 4 * 100.0 + 3 * 1.0
    assert one.scoring_s == 4 * 10_000.0
    assert one.queue_s == 0.0
    assert e.stats().busy_s == one.prefill_s + one.decode_s + one.scoring_s
    assert e.stats().steps_per_s == 4 / e.stats().busy_s


def test_waiting_is_counted_from_the_arrival_and_while_set_aside() -> None:
    e = make_engine(*tiny_triple(eos=()), kv_cache_tokens=420)
    params = [replace(SEARCH, max_new_tokens=40, seed=i, trace=False) for i in range(8)]
    results = e.generate(PROMPTS[:4] * 2, params)
    stats = e.stats()
    assert stats.set_aside == sum(of(r).set_aside for r in results) > 0
    late = max(results, key=lambda r: of(r).queue_s)
    assert of(late).queue_s > min(of(r).queue_s for r in results)
    request = e.make_request([1], SEARCH)
    request.stats.waiting_since -= 1000.0  # made long before it is submitted
    e.runner.submit(request)
    while not request.ended:
        e.runner.advance([request])
    assert request.stats.queue_s < 1000.0


def test_the_engine_adds_up_what_its_requests_cost() -> None:
    e = make_engine(*tiny_triple(eos=(0, 6, 13)))
    results = e.generate(PROMPTS, MIXED)
    stats = e.stats()
    assert (stats.waiting, stats.running) == (0, 0)
    assert (stats.finished, stats.failed, stats.aborted) == (5, 0, 0)
    assert stats.sampled_tokens == sum(r.usage.sampled_tokens for r in results)
    assert stats.scored_tokens == sum(r.usage.scored_tokens for r in results)
    assert stats.rounds == sum(of(r).rounds for r in results)
    assert 0 < stats.steps <= stats.rounds
    assert stats.steps_per_s == stats.steps / stats.busy_s
    assert stats.rounds_per_s == stats.rounds / stats.busy_s
    assert stats.tokens_per_s == stats.sampled_tokens / stats.busy_s
    assert stats.pools == {
        m.name: PoolStats(
            used_pages=0,
            cached_pages=m.pool.cached_pages,
            num_pages=1024,
            page_size=4,
            cache_lookup_tokens=m.pool.cache_statistics.lookup_tokens,
            cache_hit_tokens=m.pool.cache_statistics.hit_tokens,
        )
        for m in models_of(e)
    }


def test_passes_and_their_rows() -> None:
    e = make_engine(*tiny_triple(eos=()))
    assert e.stats().rows_per_pass == e.stats().tokens_per_s == e.stats().rounds_per_s == 0.0
    e.generate([[1, 2]], SearchParams(method="sample", n=3, max_new_tokens=5))
    stats = e.stats()
    assert stats.passes == 5  # the prompt's, and one for each token but the last
    assert stats.rows == 1 + 4 * 3
    assert stats.rows_per_pass == 13 / 5


def test_pages_and_requests_under_way_are_seen() -> None:
    e = make_engine(*tiny_triple(eos=()), max_rows=6)
    iteration = e.as_completed([[1]] * 3, [replace(SEARCH, max_new_tokens=n) for n in (1, 60, 60)])
    next(iteration)
    stats = e.stats()
    assert (stats.finished, stats.running, stats.waiting) == (1, 0, 2)
    assert all(pool.used_pages == 0 for pool in stats.pools.values())
    stream = e.stream([2], replace(SEARCH, beam_width=1, n=1), priority=-1)
    next(stream)
    stats = e.stats()
    assert stats.running >= 1
    assert all(pool.used_pages > 0 for pool in stats.pools.values())
    stream.close()
    iteration.close()
    assert e.stats().aborted == 3
    with pytest.raises(AttributeError):
        stats.finished = 3  # type: ignore[misc]


def test_failures_are_counted() -> None:
    e = make_engine(*tiny_triple(eos=()))
    error = NumericalError("for the test")

    def broken(self: Search, requests: Any) -> None:
        for request in requests:
            request.error = error
            self.abort(request)

    with mock.patch.object(Search, "step", broken):
        results = e.generate(PROMPTS, SEARCH, on_error="return")
    assert all(r.error is error and r.stats is not None for r in results)
    assert e.stats().failed == 5
    assert e.stats().finished == 0


def test_statistics_wait_for_no_step() -> None:
    e = engine()
    with e.runner.turn():
        assert e.stats().running == 0


def test_every_number_is_documented() -> None:
    from w2s_fast.stats import EngineStats

    for kind in (EngineStats, RequestStats):
        for field in fields(kind):
            assert field.name == "waiting_since" or field.name in (kind.__doc__ or "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@contextmanager
def terminal() -> Iterator[Terminal]:
    """Standard error as a terminal. In the test itself: pytest sets its own before each."""
    environment = {"TERM": "xterm", "COLUMNS": "80"}
    with (
        mock.patch.object(sys, "stderr", Terminal()) as screen,
        mock.patch.dict(os.environ, environment),
    ):
        for name in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            os.environ.pop(name, None)
        yield screen


def test_a_batch_shows_its_progress_in_a_terminal_and_wipes_it() -> None:
    with terminal() as screen:
        engine().generate(PROMPTS, SEARCH)
    shown = screen.getvalue()
    assert "5/5" in shown
    assert "tokens/s" in shown
    assert shown.endswith("\x1b[2K")  # the line is erased


def test_a_batch_of_unknown_length_shows_what_is_done() -> None:
    with terminal() as screen:
        engine().generate((p for p in PROMPTS), SEARCH)
    assert "5/?" in screen.getvalue()


def test_no_bar_for_one_prompt_or_where_it_was_not_wanted() -> None:
    with terminal() as screen:
        engine().generate([[1]], SEARCH)
        engine().generate([], SEARCH)
        engine().generate(PROMPTS, SEARCH, progress=False)
    assert screen.getvalue() == ""


@pytest.mark.parametrize("forced", [False, True])
def test_nothing_is_shown_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, forced: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    if forced:
        monkeypatch.setenv("FORCE_COLOR", "1")  # rich would take a file for a terminal
    engine().generate(PROMPTS, SEARCH)
    monkeypatch.setattr(sys, "stderr", None)  # a process without one
    engine().generate(PROMPTS, SEARCH)
    assert capfd.readouterr() == ("", "")
