"""Two cohorts: while a step of one is in flight, the host opens and closes rounds of the other.

Nobody finds anything else for it, whoever comes, leaves or fails meanwhile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tests.scheduling.test_scheduler import request, scheduler
from tests.search.test_ahead import EOS, parameters, prompt_tokens
from tests.support.cohorts import around_steps, in_cohorts, run_out
from tests.support.drawn import drawn
from tests.support.engines import (
    MIXED,
    PROMPTS,
    SEARCH,
    assert_all_pages_free,
    found,
    make_engine,
    models_of,
    quiet,
)
from tests.support.recorded import Recorded
from tests.support.tiny_models import tiny_model, tiny_triple
from w2s_fast import Engine, SearchParams
from w2s_fast.decoding.graphs import Recordings
from w2s_fast.errors import Aborted, EngineFailure, InvalidRequest
from w2s_fast.scheduling.cohorts import cohorts_of
from w2s_fast.scheduling.scheduler import Room
from w2s_fast.search import InFlight, Request, Search

ROUNDS = 4  # of SEARCH
FOUR = [[3, 1, 4], [15], [9, 2, 6, 5], [2, 7]]
LONG = replace(SEARCH, max_new_tokens=24)


@functools.cache
def four_long() -> list[Any]:
    """What FOUR find in LONG by themselves."""
    return found(make_engine(*tiny_triple(eos=())).generate(FOUR, LONG))


def new_engine(**options: Any) -> Engine:
    return in_cohorts(make_engine(*tiny_triple(eos=()), **options))


def submitted(e: Engine, prompts: Sequence[list[int]], params: Any) -> list[Request]:
    every = params if isinstance(params, list) else [params] * len(prompts)
    made = [e.make_request(prompt, own) for prompt, own in zip(prompts, every)]
    for one in made:
        e.runner.submit(one)
    return made


def flying(e: Engine) -> list[Request]:
    return [one for step in e.runner._in_flight for one in step.requests]


def assert_nothing_is_left(e: Engine) -> None:
    assert quiet(e)
    assert not e.runner._in_flight and not e.runner._under_way
    for model in models_of(e):
        model.pool.drop_cache()
    assert_all_pages_free(e)


@contextmanager
def steps() -> Iterator[list[tuple[str, list[Request]]]]:
    """What was launched and finished, by whom, in its order."""
    seen: list[tuple[str, list[Request]]] = []

    def launch(requests: list[Request], do: Callable[[], InFlight]) -> InFlight:
        seen.append(("launch", requests))
        return do()

    def finish(requests: list[Request], do: Callable[[], None]) -> None:
        seen.append(("finish", requests))
        do()

    with around_steps(launch, finish):
        yield seen


# What is found


@dataclass(frozen=True)
class Visit:
    """A request, and the turns in which it comes, and is given up; None: it is not."""

    prompt: list[int]
    params: SearchParams
    comes: int = 0
    leaves: int | None = None


visits = st.lists(
    st.builds(
        Visit,
        prompt_tokens,
        parameters(),
        st.integers(0, 6),
        st.none() | st.none() | st.integers(0, 12),
    ),
    min_size=2,
    max_size=5,
)


@functools.cache
def engine(eos: tuple[int, ...], room: int) -> Engine:
    models = [tiny_model("llama", seed=s, eos=eos, layers=1, dtype=torch.float64) for s in range(3)]
    base, tuned, untuned = models
    return make_engine(base, tuned, untuned, kv_cache_tokens=room)


def visit(e: Engine, all_visits: Sequence[Visit], fails: tuple[str, int] | None = None) -> Any:
    """What came of each visit; and whose step failed, if one did: the n-th launch, or finish."""
    made = [e.make_request(own.prompt, replace(own.params, trace=True)) for own in all_visits]
    failed: list[Request] = []
    calls = 0
    where, at = fails or ("launch", -1)
    method = getattr(Search, where)

    def failing(self: Search, given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            failed.extend(given.requests if isinstance(given, InFlight) else given)
            raise RuntimeError("for the test")
        return method(self, given)

    turn = 0
    with mock.patch.object(Search, where, failing):
        while not all(one.ended for one in made):
            for one, own in zip(made, all_visits):
                if own.comes == turn:
                    e.runner.submit(one)
                if own.leaves is not None and max(own.comes, own.leaves) == turn:
                    e.runner.give_up(one)
            e.runner.advance(())
            turn += 1
    assert_nothing_is_left(e)
    return made, failed


def known_of(e: Engine, one: Request) -> Any:
    return str(one.error) if one.error is not None else found([e.result(one)])


@pytest.mark.thorough
@drawn(40)
@given(
    st.sampled_from(EOS),
    st.sampled_from([4096, 160]),
    visits,
    st.none() | st.tuples(st.sampled_from(["launch", "finish"]), st.integers(1, 9)),
)
@example(EOS[1], 4096, [Visit(p, q, i) for i, (p, q) in enumerate(zip(PROMPTS, MIXED))], None)
@example((), 160, [Visit(p, replace(LONG, max_new_tokens=40)) for p in PROMPTS], ("finish", 3))
def test_two_cohorts_find_what_one_finds(
    eos: tuple[int, ...], room: int, all_visits: list[Visit], fails: tuple[str, int] | None
) -> None:
    e = engine(eos, room)
    alone, _ = visit(in_cohorts(e, 1), [replace(own, leaves=None) for own in all_visits])
    expected = [known_of(e, one) for one in alone]
    made, failed = visit(in_cohorts(e, 2), all_visits, fails)
    for one, own, answer in zip(made, all_visits, expected):
        if isinstance(one.error, Aborted):
            assert own.leaves is not None
        elif isinstance(one.error, EngineFailure):
            assert one in failed
        else:
            assert known_of(e, one) == answer


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("cohorts", [1, 2])
def test_a_batch_finds_the_same_in_any_number_of_cohorts(cohorts: int, ahead: bool) -> None:
    e = make_engine(*tiny_triple(eos=(0, 6, 13), dtype=torch.float64))
    expected = found(e.generate(PROMPTS * 2, MIXED * 2))
    assert found(in_cohorts(e, cohorts, ahead).generate(PROMPTS * 2, MIXED * 2)) == expected
    assert_nothing_is_left(e)


# Who takes part


def test_cohorts_take_turns_and_their_members_stay() -> None:
    """A is launched again when it is finished, and B is in flight meanwhile."""
    e = new_engine()
    with steps() as seen:
        made = submitted(e, FOUR, SEARCH)
        run_out(e, made)
    a, b = made[:2], made[2:]
    launched = [("launch", a), ("launch", b)]
    turn = [("finish", a), ("launch", a), ("finish", b), ("launch", b)]
    assert seen == [*launched, *turn * (ROUNDS - 1), ("finish", a), ("finish", b)]
    assert (e.stats().steps, e.stats().rounds) == (2 * ROUNDS, 4 * ROUNDS)


def test_few_rows_take_their_steps_together() -> None:
    """And on a CPU, where the host's tokens come first, any number does."""
    assert [cohorts_of(rows) for rows in (0, 1, 256, 1024)] == [1, 1, 1, 2]
    many = mock.patch("w2s_fast.scheduling.runner.cohorts_of", lambda rows: 1 + (rows > 12))
    for ahead, prompts, apart in [(True, 2, False), (True, 4, True), (False, 4, False)]:
        e = in_cohorts(make_engine(*tiny_triple(eos=())), None, ahead)
        with many, steps() as seen:
            run_out(e, submitted(e, FOUR[:prompts], SEARCH))
        kinds = [kind for kind, _ in seen]
        assert (kinds[:2] == ["launch", "launch"]) is apart
        assert_nothing_is_left(e)


def test_what_is_left_when_rows_get_few_goes_on_together() -> None:
    e = in_cohorts(make_engine(*tiny_triple(eos=())), None)
    many = mock.patch("w2s_fast.scheduling.runner.cohorts_of", lambda rows: 1 + (rows > 12))
    with many, steps() as seen:
        made = submitted(e, FOUR, [SEARCH, LONG, SEARCH, LONG])
        run_out(e, made)
    assert seen[-2:] == [("launch", [made[1], made[3]]), ("finish", [made[1], made[3]])]
    assert max(len(requests) for _, requests in seen) == 2
    assert found([e.result(one) for one in made]) == found(
        make_engine(*tiny_triple(eos=())).generate(FOUR, [SEARCH, LONG, SEARCH, LONG])
    )


def test_a_request_that_comes_joins_the_smaller_cohort() -> None:
    e = new_engine()
    one, two, three = submitted(e, FOUR[:3], LONG)
    e.runner.advance([one])
    e.runner.advance([one])
    assert flying(e) == [three]  # launched second, when the others were finished
    (four,) = submitted(e, FOUR[3:], LONG)
    e.runner.advance([one])
    assert flying(e) == [one, two]
    e.runner.advance([one])
    assert flying(e) == [three, four]
    run_out(e, [one, two, three, four])


WIDE = SearchParams(beam_width=2, successors=2, chunk_length=4, max_new_tokens=40)


def two_to(rows: int) -> int:
    return 2


def test_cohorts_share_rows_and_pages() -> None:
    s = scheduler(4 * 100)
    first, second, third = (request(9, WIDE) for _ in range(3))
    for one in (first, second, third):
        s.submit(one)
    chosen = s.choose((), two_to)
    assert chosen == ([first, second], [], True)
    assert s.waiting == [third]
    assert s.choose([first, second], two_to) == ([third], [], True)
    assert s.running == [first, second, third]
    assert s.choose([third], two_to) == ([first, second], [], True)
    assert s.choose([first, second, third], two_to) == ([], [], True)
    assert s.choose([], two_to).run == [first, second]
    assert s.choose([third]).apart is False


def test_one_request_has_no_other_cohort() -> None:
    s = scheduler(4 * 100)
    one = request(9, WIDE)
    s.submit(one)
    assert s.choose((), two_to) == ([one], [], False)


def test_who_is_in_flight_keeps_its_pages() -> None:
    """Others wait, if they are less urgent; if not, it is decided again when nobody flies."""
    s = scheduler(4 * 20)  # pages; in round 1 each needs 2 + 4 * 1, two fit with one to come
    first, second = request(9, WIDE), request(9, WIDE)
    for one in (first, second):
        s.submit(one)
    assert s.choose((), two_to).run == [first]
    assert s.choose([first], two_to).run == [second]
    wide = request(9, replace(WIDE, beam_width=4, successors=3))
    s.submit(wide)
    assert s.choose([second], two_to).run == [first]
    assert s.waiting == [wide]
    s.waiting.remove(wide)
    wide.urgency = (-1, 0)
    s.waiting.insert(0, wide)
    assert s.choose([second], two_to) == ([], [], False)
    assert s.running == [second, first]
    assert wide in s.choose((), two_to).run


@drawn(60)
@given(
    arrivals=st.lists(
        st.tuples(
            st.integers(0, 3),  # turns since the one before
            st.integers(1, 30),  # prompt
            st.integers(1, 4),  # W and K
            st.integers(1, 9),  # rounds
            st.integers(-1, 1),  # priority
        ),
        min_size=1,
        max_size=20,
    ),
    pages=st.integers(30, 90),
    max_rows=st.integers(1, 40),
)
@example([(0, 2, 2, 9, 0), (0, 2, 2, 9, 0), (3, 2, 3, 2, -1)], 90, 8)
def test_nobody_waits_for_ever_in_two_cohorts(
    arrivals: list[tuple[int, int, int, int, int]], pages: int, max_rows: int
) -> None:
    """A wide request is not kept out by narrow ones, of which some always fly."""
    s = scheduler(4 * pages, max_rows)
    later, wait, passed_over = list(arrivals), 0, 0
    left: dict[Request, int] = {}
    flights: list[list[Request]] = []
    for _ in range(3000):
        while later and wait >= later[0][0]:
            _, prompt, width, rounds, priority = later.pop(0)
            params = replace(WIDE, beam_width=width, successors=width)
            one = request(prompt, params, priority=priority)
            with suppress(InvalidRequest):
                s.check(one)
                s.submit(one)
                left[one] = rounds
                wait = 0
        wait += 1
        flying = [one for step in flights for one in step]
        chosen = s.choose(flying, two_to)
        everybody = [*flying, *chosen.run]
        assert len(set(everybody)) == len(everybody)
        assert sum(one.promised[0] for one in everybody) <= pages
        rows = sum(one.rows for one in everybody)
        assert rows <= max_rows or len(everybody) == 1
        urgent = min(left, key=lambda one: one.urgency, default=None)
        passed_over = 0 if urgent in everybody or urgent is None else passed_over + 1
        assert passed_over <= 1, "it waits until nobody is in flight"
        if chosen.run:
            flights.append(chosen.run)
        while len(flights) > (1 if chosen.apart and chosen.run else 0):
            for one in flights.pop(0):
                one.beams = request(len(one.prompt), one.params).beams
                left[one] -= 1
                if left[one] == 0:
                    s.remove(one)
                    del left[one]
        if not left and not later:
            return
    pytest.fail(f"{len(left)} requests never ended")


# Whoever asks for something that concerns a step in flight


def with_one_in_flight(**options: Any) -> tuple[Engine, list[Request]]:
    """The second cohort, [2:], was launched and not finished."""
    e = new_engine(**options)
    made = submitted(e, FOUR, LONG)
    e.runner.advance(made)
    e.runner.advance(made)
    assert flying(e) == made[2:]
    return e, made


def test_who_is_given_up_in_flight_ends_when_its_step_is_finished() -> None:
    e, made = with_one_in_flight()
    e.runner.give_up(made[3])
    e.runner.settle()
    assert made[3].ended and isinstance(made[3].error, Aborted)
    assert not flying(e) and made[2].beams.round == 1 and not made[2].in_round
    run_out(e, made)
    assert found([e.result(one) for one in made[:3]]) == four_long()[:3]
    assert_nothing_is_left(e)


def test_who_lets_go_leaves_nothing_in_flight() -> None:
    e = new_engine()
    for _ in e.stream(PROMPTS[0], replace(LONG, beam_width=1, n=1)):
        break
    completed = e.as_completed(PROMPTS, [replace(LONG, max_new_tokens=3), *[LONG] * 4])
    assert next(completed)[0] == 0
    assert flying(e)
    completed.close()
    assert_nothing_is_left(e)


def test_a_turn_with_room_finishes_what_is_in_flight() -> None:
    e, made = with_one_in_flight()
    with e.runner.turn_with([Room(e.base.pool, 1, 1)]):
        assert not flying(e)
    e, made = with_one_in_flight()
    expected = make_engine(*tiny_triple(eos=())).score([[1, 2]], [[3, 4]])
    assert e.score([[1, 2]], [[3, 4]]) == pytest.approx(expected)
    run_out(e, made)
    assert found([e.result(one) for one in made]) == four_long()


def test_of_a_round_in_flight_when_weights_change_nothing_is_read() -> None:
    e, made = with_one_in_flight()
    assert [one.beams.round for one in made] == [1] * 4
    e.weights_changed()
    with steps() as seen:
        e.runner.advance(made)
    assert seen == [("launch", made[:2])]
    assert [one.beams.round for one in made] == [2, 2, 0, 0]
    run_out(e, made)
    assert found([e.result(one) for one in made]) == four_long()
    assert_nothing_is_left(e)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["launch", "finish"])
def test_when_a_step_fails_the_one_in_flight_goes_on(where: str, error: type) -> None:
    e, made = with_one_in_flight()
    a, b = made[:2], made[2:]
    method = getattr(Search, where)

    def failing(self: Search, given: Any) -> Any:
        method(self, given)
        raise error("for the test")

    with mock.patch.object(Search, where, failing), suppress(KeyboardInterrupt):
        e.runner.advance(made)
    failed, well = (a, b) if where == "launch" else (b, a)
    assert all(one.ended and isinstance(one.error, EngineFailure) for one in failed)
    assert not any(one.ended for one in well)
    run_out(e, made)
    kept = [i for i, one in enumerate(made) if one in well]
    assert found([e.result(made[i]) for i in kept]) == [four_long()[i] for i in kept]
    assert_nothing_is_left(e)


# What is left alone, and what is gained


def test_a_launch_overwrites_nothing_that_is_read_of_a_step_in_flight() -> None:
    """Though it runs the same recordings, on the same memory."""
    recorded = Recorded.of(tiny_triple(eos=(), layers=1), max_rows=64)
    e = in_cohorts(recorded.engine)
    compared = overwritten = 0

    def launch(_: Any, do: Callable[[], InFlight]) -> InFlight:
        nonlocal compared, overwritten
        others = e.runner._in_flight
        on_device = [other.selection.packed for other in others if other.selection is not None]
        read = [own for other in others if other.reading is not None for own in other.reading._here]
        before = [tensor.clone() for tensor in (*read, *on_device)]
        step = do()
        compared += len(read)
        assert all(torch.equal(*both) for both in zip(read, before))
        overwritten += not all(
            torch.equal(*both) for both in zip(on_device, before[len(read) :], strict=True)
        )
        return step

    with around_steps(launch, lambda _, do: do()):
        run_out(e, submitted(e, FOUR, SEARCH))
    assert compared == 2 * ROUNDS - 1
    assert overwritten > ROUNDS


@pytest.mark.parametrize("device_s", [1, 7, 10, 40])
@pytest.mark.parametrize(("opens_s", "closes_s"), [(4, 3), (2, 8)])
def test_it_takes_as_long_as_the_longer_side_and_the_edges(
    opens_s: int, closes_s: int, device_s: int
) -> None:
    """Of each step the host's opening and closing, and the device's part, take so many seconds."""
    e = make_engine(*tiny_triple(eos=(), layers=1))

    def seconds(cohorts: int) -> int:
        in_cohorts(e, cohorts)
        now = free = 0  # the host's clock, and when the device will have done all
        ends: list[int] = []

        def launch(_: Any, do: Callable[[], InFlight]) -> InFlight:
            nonlocal now, free
            step = do()
            now += opens_s * (3 - cohorts)
            free = max(now, free) + device_s * (3 - cohorts)
            ends.append(free)
            return step

        def finish(_: Any, do: Callable[[], None]) -> None:
            nonlocal now
            do()
            now = max(now, ends.pop(0)) + closes_s * (3 - cohorts)

        with around_steps(launch, finish):
            run_out(e, submitted(e, FOUR, SEARCH))
        assert not ends
        return now

    host_s, steps = opens_s + closes_s, 2 * ROUNDS  # of one cohort
    assert seconds(1) == steps * (host_s + device_s)
    if device_s >= host_s:
        assert seconds(2) == opens_s + steps * device_s + closes_s
    else:
        # Where there is no other cohort yet, or none any more, the host waits for the device.
        waits = max(0, device_s - opens_s), max(0, device_s - closes_s)
        assert seconds(2) == steps * host_s + sum(waits)
    assert seconds(2) < seconds(1)


def test_passes_are_recorded_while_others_wait_but_nothing_is_in_flight() -> None:
    e = in_cohorts(Recorded.of(tiny_triple(eos=(), layers=1), max_rows=64).engine)
    made: list[tuple[int, int]] = []
    make = Recordings.make

    def counted(self: Recordings[Any, Any], bucket: Any) -> None:
        made.append((len(e.runner._in_flight), len(e.runner._under_way)))
        make(self, bucket)

    often = mock.patch("w2s_fast.scheduling.runner._MISSED_OFTEN", 2)
    with often, mock.patch.object(Recordings, "make", counted):
        run_out(e, submitted(e, FOUR, LONG))
    assert not any(flying for flying, _ in made)
    assert any(waiting for _, waiting in made)
