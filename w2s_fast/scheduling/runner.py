"""Runner: all requests of an engine, step by step. Any thread may drive it; one at a time does."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from w2s_fast.cache import PagePool
from w2s_fast.errors import Aborted, EngineFailure, OutOfPages, W2SFastError
from w2s_fast.scheduling.process import OwnProcess
from w2s_fast.scheduling.scheduler import Room, Scheduler
from w2s_fast.search import Request, Search
from w2s_fast.stats import EngineStats, PoolStats

T = TypeVar("T")


class Runner:
    """The owner of the search, the scheduler, and every request that has not ended.

    Whoever waits for a request takes steps until it has ended, and so serves all the others as
    well; several threads take turns. Requests may be submitted and given up at any time from any
    thread, and both take effect between two steps.

    Attributes:
        process: the only one in which steps are taken.
    """

    def __init__(self, search: Search, scheduler: Scheduler) -> None:
        self._search = search
        self._scheduler = scheduler
        self.process = OwnProcess()
        self._turn = threading.Lock()
        self._next_turn = threading.Lock()
        self._arrived: deque[Request] = deque()
        self._given_up: deque[tuple[Request, W2SFastError]] = deque()
        self._weights_changed = threading.Event()  # somebody said so
        self._finished = 0
        self._failed = 0
        self._aborted = 0
        self._set_aside = 0
        self._steps = 0
        self._rounds = 0
        self._busy_s = 0.0
        self._sampled_tokens = 0
        self._scored_tokens = 0

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Nobody else takes a step meanwhile. Not reentrant. EngineFailure in another process."""
        self.process.check()
        # A thread that takes one turn after the other would get a lock again before those who wait
        # for it woke up: so the next one in line is chosen while the turn is still under way.
        with self._next_turn:
            self._turn.acquire()
        try:
            yield
        finally:
            self._turn.release()
            self.settle()

    @contextmanager
    def turn_with(self, rooms: Sequence[Room]) -> Iterator[None]:
        """A turn in which so many pages and slots are free; they are to be free again at its end.

        Running requests are set aside for it, the least urgent first, and go on afterwards. Those
        in the middle of a round end it before that, in steps in which nobody begins another.

        Raises:
            OutOfPages: there would not be so much if nothing ran.
        """
        with self.turn():
            self._settle()
            self._follow_models()
            while not all(room.there for room in rooms):
                if (request := self._scheduler.set_aside_for(rooms)) is not None:
                    self._put_aside([request])
                elif in_round := self._scheduler.in_round:
                    self._run(in_round)
                else:
                    raise OutOfPages("more pages or slots are wanted than the KV cache has")
                self._settle()  # a request may have been given up meanwhile
            yield

    def submit(self, request: Request) -> None:
        """Take a request on; it has been checked. It enters with the next step."""
        request.stats.arrive()
        self._arrived.append(request)

    def give_up(self, request: Request, error: W2SFastError | None = None) -> None:
        """End a submitted request with an error, :class:`Aborted` if None; nothing if it has ended.

        Takes effect when the step under way is over, or with :meth:`settle`.
        """
        self._given_up.append((request, error or Aborted("the request was given up")))

    def settle(self) -> None:
        """Let abortions take effect, now or when the turn under way is over. Never waits.

        So it can be called where generators are closed: by the garbage collector, which may come
        in the middle of a step, in the thread that takes it. In another process nothing is left
        to be freed.
        """
        while self.process.is_here and self._given_up and self._turn.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self._turn.release()

    def advance(self, awaited: Collection[Request]) -> None:
        """Take a step when it is our turn, unless one of the awaited requests ended before."""
        with self.turn():
            if not any(request.ended for request in awaited):
                self._step()

    def weights_changed(self) -> None:
        """Nothing that was computed so far is used from the next step on. Never waits."""
        self._weights_changed.set()

    def stats(self) -> EngineStats:
        """Counts since the runner was made. It waits for no step: some may be of the one before."""
        return EngineStats(
            waiting=len(self._scheduler.waiting) + len(self._arrived),
            running=len(self._scheduler.running),
            finished=self._finished,
            failed=self._failed,
            aborted=self._aborted,
            set_aside=self._set_aside,
            steps=self._steps,
            rounds=self._rounds,
            busy_s=self._busy_s,
            sampled_tokens=self._sampled_tokens,
            scored_tokens=self._scored_tokens,
            rows=self._search.base.rows,
            passes=self._search.base.passes,
            pools={model.name: _pool_stats(model.pool) for model in self._search.models},
        )

    def _settle(self) -> None:
        # In this order: who is given up now has arrived before.
        given_up = list(_drain(self._given_up))
        for request in _drain(self._arrived):
            self._scheduler.submit(request)
        for request, error in given_up:
            if not request.ended:
                request.error = error
                self._search.abort(request)
                self._leave(request)
                self._tell(request)

    def _step(self) -> None:
        """Bring those requests a step further whose turn it is."""
        self._settle()
        self._follow_models()
        chosen, set_aside = self._scheduler.choose()
        self._put_aside(set_aside)
        self._run(chosen)

    def _follow_models(self) -> None:
        """Where weights were changed, running requests give up what they hold, and recompute it.

        What a request drew and kept before stays; the round under way begins again. One that has
        given out tokens of that round cannot take them back, and ends with an error.
        """
        announced = self._weights_changed.is_set()
        self._weights_changed.clear()
        changed = [model.name for model in self._search.models if model.follow(announced)]
        if not changed:
            return
        for request in list(self._scheduler.running):
            self._search.start_over(request)
            if len(request.agreed) > len(request.agreed_tokens()):
                why = "in the middle of a round of which tokens had been streamed"
                request.error = EngineFailure(f"weights of {', '.join(changed)} changed {why}")
                self._leave(request)
                self._tell(request)

    def _put_aside(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self._search.set_aside(request)
        self._set_aside += len(requests)

    def _run(self, chosen: Sequence[Request]) -> None:
        """Bring the chosen requests a step further.

        A failure inside the models that concerns no single request ends all that took part, with
        :class:`EngineFailure`; those that wait go on.
        """
        before = _counts(chosen)
        begin = time.perf_counter()
        try:
            self._search.step(chosen)
        except BaseException as error:
            self._fail(chosen, error)
            if not isinstance(error, Exception):  # the user's interrupt
                raise
        finally:
            self._steps += bool(chosen)
            self._busy_s += time.perf_counter() - begin
            rounds, sampled, scored = (a - b for a, b in zip(_counts(chosen), before))
            self._rounds += rounds
            self._sampled_tokens += sampled
            self._scored_tokens += scored
            for request in chosen:
                if request.done:
                    self._leave(request)
                elif request.streams:
                    request.agreed = request.agreed_tokens()
                self._tell(request)

    def _fail(self, requests: Sequence[Request], error: BaseException) -> None:
        for request in requests:
            if request.error is None:  # each its own: callers raise it, and add to it
                request.error = EngineFailure(f"{type(error).__name__}: {error}")
                request.error.__cause__ = error
        for request in requests:
            self._search.abort(request)

    def _leave(self, request: Request) -> None:
        self._scheduler.remove(request)
        self._finished += request.error is None
        self._aborted += isinstance(request.error, Aborted)
        self._failed += request.error is not None and not isinstance(request.error, Aborted)
        request.ended = True

    def _tell(self, request: Request) -> None:
        if request.listener is None:
            return
        try:
            request.listener()
        except Exception as error:  # this request's failure, and nobody else's
            request.listener = None
            self.give_up(request, EngineFailure(f"its listener failed: {error}"))


def _pool_stats(pool: PagePool) -> PoolStats:
    found = pool.cache_statistics
    return PoolStats(
        used_pages=pool.num_pages - pool.free_pages,
        cached_pages=pool.cached_pages,
        num_pages=pool.num_pages,
        page_size=pool.page_size,
        cache_lookup_tokens=found.lookup_tokens,
        cache_hit_tokens=found.hit_tokens,
    )


def _counts(requests: Sequence[Request]) -> tuple[int, int, int]:
    """Rounds, tokens sampled and tokens scored so far."""
    return (
        sum(r.stats.rounds for r in requests),
        sum(r.sampled_tokens for r in requests),
        sum(r.scored_tokens for r in requests),
    )


def _drain(queue: deque[T]) -> Iterator[T]:
    while queue:
        yield queue.popleft()
