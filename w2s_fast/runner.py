"""Runner: all requests of an engine, step by step. Any thread may drive it; one at a time does."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Collection, Sequence

from w2s_fast.errors import Aborted, EngineFailure, W2SFastError
from w2s_fast.pages import PagePool
from w2s_fast.request import Request
from w2s_fast.scheduler import Scheduler
from w2s_fast.search import Search
from w2s_fast.stats import EngineStats, PoolStats


class Runner:
    """The owner of the search, the scheduler, and every request that has not ended.

    Requests may be submitted and given up at any time from any thread; both take effect when the
    next step begins.

    Attributes:
        lock: held during a step; whoever reads a request that has not ended takes it.
    """

    def __init__(self, search: Search, scheduler: Scheduler) -> None:
        self._search = search
        self._scheduler = scheduler
        self.lock = threading.RLock()
        self._arrived: deque[Request] = deque()
        self._given_up: deque[Request] = deque()
        self._finished = 0
        self._failed = 0
        self._set_aside = 0
        self._steps = 0
        self._busy_s = 0.0
        self._sampled_tokens = 0
        self._scored_tokens = 0

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        scheduler = self._scheduler
        return not (self._arrived or self._given_up or scheduler.waiting or scheduler.running)

    def submit(self, request: Request) -> None:
        """Take a request on; it has been checked."""
        self._arrived.append(request)

    def give_up(self, request: Request) -> None:
        """End a request with :class:`Aborted` before the next step; nothing if it has ended."""
        self._given_up.append(request)

    def give_up_all(self) -> None:
        """End every request with :class:`Aborted`."""
        with self.lock:
            self.settle()
            for request in [*self._scheduler.waiting, *self._scheduler.running]:
                self.give_up(request)
            self.settle()

    def settle(self) -> list[Request]:
        """Let submissions and abortions take effect; returns the requests that ended by it."""
        with self.lock:
            while self._arrived:
                self._scheduler.submit(self._arrived.popleft())
            ended = []
            while self._given_up:
                request = self._given_up.popleft()
                if not request.ended and request not in ended:
                    request.error = Aborted("the request was given up")
                    self._search.abort(request)
                    ended.append(request)
            self._leave(ended)
            for request in ended:
                if request.listener is not None:
                    request.listener()
            return ended

    def advance(self, awaited: Collection[Request]) -> None:
        """Take a step, unless one of the awaited requests has already ended."""
        with self.lock:
            if not any(request.ended for request in awaited):
                self.step()

    def step(self) -> list[Request]:
        """Bring the chosen requests a step further; returns all that took part or ended.

        A failure inside the models that concerns no single request ends all that took part, with
        :class:`EngineFailure`; those that wait go on.
        """
        with self.lock:
            ended = self.settle()
            chosen, set_aside = self._scheduler.choose()
            for request in set_aside:
                self._search.set_aside(request)
            self._set_aside += len(set_aside)
            before = _tokens(chosen)
            begin = time.perf_counter()
            try:
                self._search.step(chosen)
            except BaseException as error:
                self._fail(chosen, error)
                if not isinstance(error, Exception):  # the user's interrupt
                    self._leave(chosen)
                    raise
            finally:
                self._steps += bool(chosen)
                self._busy_s += time.perf_counter() - begin
                sampled, scored = _tokens(chosen)
                self._sampled_tokens += sampled - before[0]
                self._scored_tokens += scored - before[1]
            self._leave([request for request in chosen if request.done])
            for request in chosen:
                if request.listener is not None:
                    request.listener()
            return [*ended, *chosen]

    def stats(self) -> EngineStats:
        """Counts since the runner was made."""
        with self.lock:
            return EngineStats(
                waiting=len(self._scheduler.waiting) + len(self._arrived),
                running=len(self._scheduler.running),
                finished=self._finished,
                failed=self._failed,
                set_aside=self._set_aside,
                steps=self._steps,
                busy_s=self._busy_s,
                sampled_tokens=self._sampled_tokens,
                scored_tokens=self._scored_tokens,
                rows=self._search.rows,
                passes=self._search.passes,
                pools={model.name: _pool_stats(model.pool) for model in self._search.models},
            )

    def _fail(self, requests: Sequence[Request], error: BaseException) -> None:
        for request in requests:
            if request.error is None:
                if isinstance(error, W2SFastError):
                    request.error = error
                else:
                    request.error = EngineFailure(f"{type(error).__name__}: {error}")
                    request.error.__cause__ = error
            self._search.abort(request)

    def _leave(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self._scheduler.remove(request)
            request.ended = True
            self._failed += request.error is not None
            self._finished += request.error is None


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


def _tokens(requests: Sequence[Request]) -> tuple[int, int]:
    """Tokens sampled and scored so far."""
    return sum(r.sampled_tokens for r in requests), sum(r.scored_tokens for r in requests)
