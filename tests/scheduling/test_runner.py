"""The runner: whoever calls takes turns with the others, and steps for all of them."""

from __future__ import annotations

import threading
from collections import deque
from unittest import mock

import pytest

from tests.support.engines import (
    LONG,
    PROMPTS,
    SEARCH,
    assert_all_pages_free,
    engine,
    found,
    quiet,
    tiny_engine,
)
from w2s_fast.errors import Aborted, EngineFailure
from w2s_fast.scheduling.runner import Runner
from w2s_fast.search.request import Request
from w2s_fast.search.search import Search


def test_a_listener_that_fails_ends_its_own_request() -> None:
    e = tiny_engine(eos=())
    broken = e.make_request([1], LONG)
    broken.listener = mock.Mock(side_effect=RuntimeError("for the test"))
    e.runner.submit(broken)
    assert found(e.generate(PROMPTS, SEARCH)) == found(engine(eos=()).generate(PROMPTS, SEARCH))
    assert isinstance(broken.error, EngineFailure)
    assert broken.ended
    assert broken.listener is None
    assert_all_pages_free(e)


def test_an_interrupt_of_one_caller_leaves_nobody_waiting() -> None:
    e = tiny_engine(eos=(), max_rows=12)
    others = [e.make_request(prompt, LONG) for prompt in PROMPTS[:2]]
    for request in others:
        request.listener = mock.Mock()
        e.runner.submit(request)
    interrupted = mock.patch.object(Search, "step", side_effect=KeyboardInterrupt)
    with interrupted, pytest.raises(KeyboardInterrupt):
        e.generate(PROMPTS, SEARCH)
    for request in others:
        assert request.ended
        assert isinstance(request.error, EngineFailure)
        assert request.listener is not None
        request.listener.assert_called_once_with()  # type: ignore[attr-defined]
    assert quiet(e)
    assert_all_pages_free(e)
    assert found(e.generate(PROMPTS, SEARCH)) == found(engine(eos=()).generate(PROMPTS, SEARCH))


def test_a_request_may_be_given_up_before_it_was_seen() -> None:
    e = tiny_engine(eos=())
    request = e.make_request([1], LONG)
    e.runner.submit(request)
    e.runner.give_up(request)
    e.runner.give_up(request)
    e.runner.settle()
    assert request.ended
    assert isinstance(request.error, Aborted)
    assert e.stats().aborted == 1
    assert quiet(e)


def test_a_request_may_come_and_go_while_a_step_begins() -> None:
    """Just when all arrivals have been taken in, and before what was given up is looked at."""
    e = tiny_engine(eos=())
    request = e.make_request([1], LONG)

    class Arrivals(deque[Request]):
        def __bool__(self) -> bool:
            some = len(self) > 0
            if not some and request.listener is None:
                request.listener = lambda: None
                e.runner.submit(request)
                e.runner.give_up(request)
            return some

    e.runner._arrived = Arrivals()
    assert found(e.generate([[2]], SEARCH)) == found(engine(eos=()).generate([[2]], SEARCH))
    assert isinstance(request.error, Aborted)
    assert quiet(e)
    assert_all_pages_free(e)


def test_turns_go_to_those_who_wait() -> None:
    """A thread that takes step after step does not keep another from its own."""
    runner: Runner = tiny_engine().runner
    order: list[str] = []

    def other() -> None:
        with runner.turn():
            order.append("other")

    thread = threading.Thread(target=other)
    with runner.turn():
        order.append("first")
        thread.start()
        while not runner._next_turn.locked():  # until it stands in line
            pass
    with runner.turn():
        order.append("again")
    thread.join()
    assert order == ["first", "other", "again"]


def test_scoring_takes_its_turn() -> None:
    e = tiny_engine()
    scores: list[float] = []
    thread = threading.Thread(target=lambda: scores.extend(e.score([[1, 2]], [[3, 4]])))
    with e.runner.turn():
        thread.start()
        while thread.is_alive() and not e.runner._next_turn.locked():
            pass
        assert not scores
    thread.join()
    assert scores == e.score([[1, 2]], [[3, 4]])
