"""How much is under way, and who still comes in."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from contextlib import contextmanager

from w2s_fast.serve.refusals import Refusal

_LONGEST_WAIT = 60  # seconds that a client is told at most
_MEMORY = 0.2  # share of the latest request in the mean


class Gate:
    """Counts requests, a prompt each; of one event loop.

    Attributes:
        under_way: that have come in and not left.
        draining: nobody comes in any more.
    """

    def __init__(self, most: int) -> None:
        self.under_way = 0
        self.draining = False
        self._most = most
        self._seconds = 1.0  # of a request, on average
        self._empty = asyncio.Event()
        self._empty.set()

    @contextmanager
    def enter(self, requests: int) -> Iterator[None]:
        """So many come in, and leave when the block ends.

        Raises:
            Refusal: 429, with the time after which room is likely; 503 while draining.
        """
        if self.draining:
            raise Refusal(
                503, "the server is stopping", code="stopping", headers={"Retry-After": "1"}
            )
        # One that is larger than the queue comes in alone.
        if self.under_way and self.under_way + requests > self._most:
            after = min(_LONGEST_WAIT, max(1, math.ceil(self._seconds)))
            raise Refusal(
                429,
                f"{self.under_way} requests run or wait; allowed: {self._most}; try again in "
                f"{after} s",
                code="queue_full",
                headers={"Retry-After": str(after)},
            )
        loop = asyncio.get_running_loop()
        begin = loop.time()
        self.under_way += requests
        self._empty.clear()
        try:
            yield
        finally:
            self.under_way -= requests
            self._seconds += _MEMORY * (loop.time() - begin - self._seconds)
            if not self.under_way:
                self._empty.set()

    async def drain(self, seconds: float) -> bool:
        """Let nobody in any more; whether all have left within the time."""
        self.draining = True
        try:
            await asyncio.wait_for(self._empty.wait(), seconds)
        except asyncio.TimeoutError:
            return False
        return True
