"""How far a search has come, and how long the rest takes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.engines import tiny_engine
from w2s_fast import Engine, SearchParams, Usage
from w2s_fast.cli import pace
from w2s_fast.cli.pace import Pace, clock, most_rounds, most_sampled
from w2s_fast.stats import EngineStats

WHOLE = SearchParams(ignore_eos=True, max_new_tokens=12)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return tiny_engine()


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"beam_width": (4, 2, 1), "successors": (2, 3), "chunk_length": (3, 4)},
        {"chunk_length": None, "beam_width": 2},
        {"method": "bon", "successors": 3},
        {"method": "sample", "n": 2},
        {"beam_width": 1, "successors": 1, "chunk_length": 5},
    ],
    ids=str,
)
def test_what_never_ends_samples_the_most_in_the_most_rounds(
    engine: Engine, more: dict[str, Any]
) -> None:
    params = SearchParams(**{"ignore_eos": True, "max_new_tokens": 12, **more})
    (result,) = engine.generate([[1, 2, 3]], params)
    assert result.stats is not None
    assert result.usage.sampled_tokens == most_sampled(params)
    assert result.stats.rounds == most_rounds(params)


def test_chunks_that_end_at_strings_have_no_most_rounds() -> None:
    params = SearchParams(chunk_stop="\n", max_new_tokens=12)
    assert most_rounds(params) is None and most_sampled(params) == 16 * 12


class Ticking:
    """Counts as an engine has them, and a clock, both as they are told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
        self.seconds, self.sampled, self.rounds = 0.0, 0, 0
        self._before = engine.stats()
        monkeypatch.setattr(pace.time, "perf_counter", lambda: self.seconds)

    def __call__(self) -> EngineStats:
        told = {"sampled_tokens": self.sampled, "rounds": self.rounds}
        return EngineStats(**{**vars(self._before), **told})


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> Ticking:
    return Ticking(monkeypatch, engine)


def test_there_is_an_estimate_from_the_first_round_on(ticking: Ticking) -> None:
    own = Pace(ticking, total=10)
    assert own.seconds_left is None
    for _ in range(2):
        own.expect(WHOLE)  # 16 rows of 12 tokens
    assert own.seconds_left is None
    ticking.seconds, ticking.sampled = 2.0, 192
    assert own.tokens_per_s == 96.0
    assert own.seconds_left == pytest.approx(9 * 192 / 96)
    ticking.seconds = 5.0  # in the middle of a step
    assert own.tokens_per_s == 96.0
    assert own.seconds_left == pytest.approx(9 * 192 / 96 - 3.0)


def test_answers_say_how_long_the_others_are(ticking: Ticking) -> None:
    own = Pace(ticking, total=10)
    own.expect(WHOLE)
    ticking.seconds, ticking.sampled = 1.0, 150
    own.answered(Usage(3, 5, sampled_tokens=50, scored_tokens=50))
    own.failed()
    assert own.seconds_left == pytest.approx((8 * 50 - 100) / 150)
    ticking.sampled = 10_000
    assert own.seconds_left == 0.0


def test_a_single_search_ends_with_its_last_round(ticking: Ticking) -> None:
    own = Pace(ticking, total=1)
    own.expect(WHOLE)  # 3 rounds
    assert own.round == 1
    ticking.seconds, ticking.sampled, ticking.rounds = 1.0, 8, 2  # most candidates have ended
    assert own.round == 3 and own.seconds_left == pytest.approx(0.5)
    ticking.rounds = 3
    assert own.round == 3 and own.seconds_left == 0.0


def test_where_nobody_knows_how_much_is_to_come_there_is_no_estimate(ticking: Ticking) -> None:
    own = Pace(ticking, total=None)
    own.expect(WHOLE)
    ticking.seconds, ticking.sampled = 1.0, 150
    assert own.seconds_left is None and own.tokens_per_s == 150.0


def test_times_are_written_as_clocks_have_them() -> None:
    assert [clock(s) for s in (0.4, 61, 3599.6, 36_061)] == ["0:00", "1:01", "1:00:00", "10:01:01"]
