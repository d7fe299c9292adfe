"""Runner: all requests of an engine, step by step. Any thread may drive it; one at a time does."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection, Sequence

from w2s_fast.errors import Aborted, EngineFailure, W2SFastError
from w2s_fast.request import Request
from w2s_fast.scheduler import Scheduler
from w2s_fast.search import Search


class Runner:
    """The owner of the search, the scheduler, and every request that has not ended.

    Requests may be submitted and given up at any time from any thread; both take effect when the
    next step begins. Steps exclude each other.
    """

    def __init__(self, search: Search, scheduler: Scheduler) -> None:
        self._search = search
        self._scheduler = scheduler
        self._lock = threading.RLock()
        self._arrived: deque[Request] = deque()
        self._given_up: deque[Request] = deque()

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

    def settle(self) -> list[Request]:
        """Let submissions and abortions take effect; returns the requests that ended by it."""
        with self._lock:
            while self._arrived:
                self._scheduler.submit(self._arrived.popleft())
            ended = []
            while self._given_up:
                request = self._given_up.popleft()
                if not request.ended:
                    request.error = Aborted("the request was given up")
                    self._search.abort(request)
                    ended.append(request)
            self._leave(ended)
            return ended

    def advance(self, awaited: Collection[Request]) -> None:
        """Take a step, unless one of the awaited requests has already ended."""
        with self._lock:
            if not any(request.ended for request in awaited):
                self.step()

    def step(self) -> list[Request]:
        """Bring the chosen requests a step further; returns all that took part or ended.

        A failure inside the models that concerns no single request ends all that took part, with
        :class:`EngineFailure`; those that wait go on.
        """
        with self._lock:
            ended = self.settle()
            chosen, set_aside = self._scheduler.choose()
            for request in set_aside:
                self._search.set_aside(request)
            try:
                self._search.step(chosen)
            except BaseException as error:
                self._fail(chosen, error)
                if not isinstance(error, Exception):  # the user's interrupt
                    self._leave(chosen)
                    raise
            self._leave([request for request in chosen if request.done])
            return [*ended, *chosen]

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
