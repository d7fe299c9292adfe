"""Engines whose requests run in two cohorts, however few rows they have; and their steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

from w2s_fast import Engine
from w2s_fast.scheduling import Runner
from w2s_fast.search import InFlight, Request, Search


def in_cohorts(e: Engine, cohorts: int | None = 2, ahead: bool = True) -> Engine:
    """The same engine, which nobody uses yet, with another runner; see :class:`Runner`.

    Its steps are launched ahead, as on CUDA, if that is asked for.
    """
    e._search._ahead = ahead
    e.runner = Runner(e._search, e._scheduler, cohorts=cohorts)
    return e


def run_out(e: Engine, requests: Sequence[Request]) -> None:
    """Take turns until all of these have ended."""
    while under_way := [one for one in requests if not one.ended]:
        e.runner.advance(under_way)


@contextmanager
def around_steps(
    launch: Callable[[list[Request], Callable[[], InFlight]], InFlight],
    finish: Callable[[list[Request], Callable[[], None]], None],
) -> Iterator[None]:
    """In the place of the two parts of a step these are called, with whose it is, and that part."""
    own_launch, own_finish = Search.launch, Search.finish

    def launched(self: Search, requests: Sequence[Request]) -> InFlight:
        return launch(list(requests), lambda: own_launch(self, requests))

    def finished(self: Search, step: InFlight) -> None:
        finish(list(step.requests), lambda: own_finish(self, step))

    with (
        mock.patch.object(Search, "launch", launched),
        mock.patch.object(Search, "finish", finished),
    ):
        yield
