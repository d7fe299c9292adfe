"""Which requests share the next step: those whose round surely fits, the most urgent first.

A request is promised the pages of a whole round before the round starts, and keeps the promise
until the round ends, so a round never runs out of pages half way. Between two rounds a request that
no longer fits is set aside: it gives up all its pages, waits in its old place, and is recomputed.

Order: a request is as urgent as the step in which it came, plus ``ROUNDS_PER_PRIORITY`` steps for
each level of priority. That number never changes, so nobody is overtaken for ever; and every step
serves the most urgent first, running or not, so the most urgent one waits at most for the rounds
that are under way.

In several cohorts each step takes a share of all rows: those of the others are in flight, or wait
for the next step. So a request stays with the same ones, the rows of the cohorts stay alike, and
who comes joins the one that has fewer.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Collection, Iterable, Sequence
from heapq import merge
from itertools import accumulate
from operator import attrgetter
from typing import NamedTuple

from w2s_fast._pages import in_rounds, round_pages, round_rows
from w2s_fast.cache import PagePool
from w2s_fast.errors import InvalidRequest
from w2s_fast.models import PagedModel
from w2s_fast.scheduling.cohorts import one_cohort
from w2s_fast.scheduling.footprint import pages_at_most
from w2s_fast.search import Request

# How many steps a request of one priority waits for those of the next higher one.
ROUNDS_PER_PRIORITY = 1000
# Share of the pages that a request leaves free when it enters, so that those that run have room to
# grow and are not set aside at once.
_HEADROOM = 32
# Waiting requests that did not fit, before the others are not looked at: a step should not walk
# over a long queue.
_MOST_MISSES = 16


class Choice(NamedTuple):
    """Which requests take part in the next step, and which running ones give up their pages.

    ``apart``: others take their steps in another cohort, so nobody need wait for this one.
    """

    run: list[Request]
    set_aside: list[Request]
    apart: bool = False


class Room(NamedTuple):
    """Free pages and slots of one model that somebody wants between two steps, and gives back."""

    pool: PagePool
    pages: int
    slots: int

    @property
    def there(self) -> bool:
        return self.pool.free_pages >= self.pages and self.pool.free_slots >= self.slots


class Scheduler:
    """All requests that have come and not ended: those that wait, and those that run."""

    def __init__(self, models: Sequence[PagedModel], max_rows: int) -> None:
        """Over the models of a search, the base first.

        ``max_rows``: rows of a decoding step; one request alone may have more.
        """
        self.max_rows = max_rows
        self.waiting: list[Request] = []  # the most urgent first
        self.running: list[Request] = []
        self._models = list(models)
        pools = [model.pool for model in models]
        self._pages = [pool.num_pages for pool in pools]
        self._headroom = [pages // _HEADROOM for pages in self._pages]
        self._page_sizes = [pool.page_size for pool in pools]
        self._steps = 0
        self._submitted = 0

    def check(self, request: Request) -> None:
        """Whether the request could run alone.

        Raises:
            InvalidRequest: names the model, what is needed and what there is.
        """
        for m, model in enumerate(self._models[: 1 if not request.uses_guides else None]):
            pool = model.pool
            needed = pages_at_most(request, m, pool.page_size)
            if needed > pool.num_pages:
                raise InvalidRequest(
                    f"the request can need {needed * pool.page_size} tokens of KV cache in "
                    f"{model.name}, which has {pool.num_pages * pool.page_size}; allowed: a "
                    "shorter prompt, fewer candidates or new tokens, or a larger kv_cache_tokens"
                )
            rows, slots = request.params.rows, pool.manager.max_slots
            if rows > slots:
                raise InvalidRequest(f"the request has {rows} candidates; allowed: {slots}")

    def submit(self, request: Request) -> None:
        """Let a checked request wait for its turn."""
        request.urgency = (
            self._steps + ROUNDS_PER_PRIORITY * request.priority,
            self._submitted,
        )
        self._submitted += 1
        self._wait(request)

    def remove(self, request: Request) -> None:
        """Forget a request that has ended, or is given up; nothing if it is forgotten already."""
        for requests in (self.running, self.waiting):
            if request in requests:
                requests.remove(request)

    def restore(self, requests: Iterable[Request]) -> None:
        """After an interruption: these have come and not ended. Those that hold pages run."""
        found = list(requests)
        self.running = [request for request in found if request.beams.holds]
        self.waiting = sorted((r for r in found if not r.beams.holds), key=_urgency)

    def choose(
        self,
        in_flight: Collection[Request] = (),
        cohorts_of: Callable[[int], int] = one_cohort,
    ) -> Choice:
        """Decide who takes part in the next step; ``running`` and ``waiting`` follow.

        Of those in the middle of a round, who waits for somebody that chooses for it, or draws,
        takes no part, and keeps rows and pages.

        Nobody does if somebody more urgent than those in flight had to wait for their pages or
        rows: it is decided again when they are no longer in flight.

        Args:
            in_flight: those of steps under way, who keep their rows and what they were promised.
            cohorts_of: how many cohorts so many rows, of all that run, are run in.
        """
        self._steps += 1
        free = self._pages
        flying = set(in_flight)
        here = [r for r in self.running if r not in flying] if flying else self.running
        opened = in_rounds([request.beams for request in here])
        chosen = [request for request, is_open in zip(here, opened) if is_open]
        resting = [request for request in chosen if request.rests]
        if resting:
            at_rest = set(resting)  # as it was when it was asked for
            chosen = [request for request in chosen if request not in at_rest]
        between = [request for request, is_open in zip(here, opened) if not is_open]
        between.sort(key=_urgency)
        taken = [*in_flight, *resting, *chosen]
        rows = sum(request.rows for request in taken)
        for request in taken:
            free = [f - p for f, p in zip(free, request.promised)]
        latest = max(map(_urgency, in_flight)) if in_flight else None
        set_aside: list[Request] = []
        entered: set[Request] = set()
        misses = 0
        # All that may be looked at: the requests that run, and as many of the others as can enter
        # or be missed.
        waiting = self.waiting[: self.max_rows + _MOST_MISSES]
        asking = list(merge(between, waiting, key=_urgency)) if waiting else between
        beams = [request.beams for request in asking]
        pages_of = round_pages(beams, self._page_sizes)
        # Of the round at hand, like the pages: a width that falls frees room at once.
        for request, own in zip(asking, round_rows(beams)):
            request.rows = own
        wanted = sum(request.rows for request in asking)
        if (
            not waiting
            and rows + wanted <= self.max_rows
            and all(sum(needed) <= f for needed, f in zip(zip(*pages_of), free))
        ):  # as long as nobody comes, and all have room
            for request, needed in zip(asking, pages_of):
                request.promised = needed
            chosen += asking
            rows += wanted
            asking = []
        running = set(between) if asking else set()
        for request, needed in zip(asking, pages_of):
            waits = request not in running
            if waits and misses == _MOST_MISSES:
                continue
            fits = not rows or rows + request.rows <= self.max_rows
            if waits and rows:
                fits = fits and all(
                    n == 0 or n + h <= f for n, h, f in zip(needed, self._headroom, free)
                )
            else:
                fits = fits and all(n <= f for n, f in zip(needed, free))
            if fits:
                request.promised = needed
                free = [f - n for f, n in zip(free, needed)]
                rows += request.rows
                chosen.append(request)
                if waits:
                    entered.add(request)
            elif latest is not None and _urgency(request) < latest:
                return Choice([], [])
            elif waits:
                misses += 1
            else:
                set_aside.append(request)
        run = chosen
        if (cohorts := cohorts_of(rows)) > 1:
            before = accumulate((request.rows for request in chosen), initial=0)
            run = [request for request, others in zip(chosen, before) if others < rows / cohorts]
        later = [request for request in chosen[len(run) :] if request not in entered]
        for request in entered.intersection(run):
            self.waiting.remove(request)
            request.stats.enter()
        for request in set_aside:
            self._wait(request)
            request.stats.wait()
        self.running = [*in_flight, *resting, *run, *later]
        apart = len(run) < len(chosen) or (bool(in_flight) and cohorts > 1)
        return Choice(run, set_aside, apart)

    @property
    def in_round(self) -> list[Request]:
        """Those in the middle of a round: they keep what they were promised until it ends."""
        opened = in_rounds([request.beams for request in self.running])
        return [request for request, is_open in zip(self.running, opened) if is_open]

    def set_aside_for(self, rooms: Iterable[Room]) -> Request | None:
        """Let one running request wait and give up its pages, so that others may have room.

        The least urgent one between two rounds that holds pages where they are missing; None:
        there is no such request.
        """
        missing = [room.pool for room in rooms if not room.there]
        between = [
            request
            for request in self.running
            if not request.in_round
            and any(
                pages and any(model.pool is pool for pool in missing)
                for pages, model in zip(request.promised, self._models)
            )
        ]
        if not between:
            return None
        request = max(between, key=_urgency)
        self.running.remove(request)
        self._wait(request)
        request.stats.wait()
        return request

    def _wait(self, request: Request) -> None:
        insort(self.waiting, request, key=_urgency)


_urgency: Callable[[Request], tuple[int, int]] = attrgetter("urgency")
