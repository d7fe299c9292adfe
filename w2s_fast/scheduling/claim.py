"""Claim: the requests of one caller, which end when nobody waits for them any longer."""

from __future__ import annotations

from w2s_fast.scheduling.runner import Runner
from w2s_fast.search import Request


class Claim:
    """The requests that one caller has submitted, and has not got back.

    Those that have not ended are given up when the caller lets go of them. If it cannot come to
    that, because something interrupts its very end, they are when the claim itself is gone.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._requests: dict[Request, None] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def submit(self, request: Request) -> None:
        """Take a request on, and have it run."""
        self._requests[request] = None  # first, so that nobody's request ever runs
        self._runner.submit(request)

    def advance(self) -> list[Request]:
        """Take a step, unless a request has ended; those that have, which are the caller's now."""
        self._runner.advance(self._requests)
        ended = [request for request in self._requests if request.ended]
        for request in ended:
            del self._requests[request]
        return ended

    def let_go(self) -> None:
        """Give up what has not ended, now or when the turn under way is over. Never waits."""
        for request in self._requests:
            if not request.ended:
                self._runner.give_up(request)
        self._runner.settle()

    def __del__(self) -> None:
        try:
            self._give_up()
        except BaseException:  # nobody else is left who could
            self._give_up()
            raise

    def _give_up(self) -> None:
        if getattr(self, "_requests", None):  # it may be gone before it was made
            self.let_go()
