"""Runner: all requests of an engine, step by step. Any thread may drive it; one at a time does."""

from __future__ import annotations

import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import NamedTuple

from w2s_fast._pages import Hold, are_done, progress
from w2s_fast.cache import PagePool
from w2s_fast.decoding import HomeStream
from w2s_fast.errors import (
    Aborted,
    EngineFailure,
    InvalidRequest,
    OutOfPages,
    RankFailure,
    W2SFastError,
)
from w2s_fast.models import Ranks, inference
from w2s_fast.scheduling.cohorts import cohorts_of
from w2s_fast.scheduling.judge import Judge
from w2s_fast.scheduling.orders import (
    TOGETHER,
    Following,
    GivenUp,
    Leading,
    MakeRequest,
    Order,
    Orders,
    Work,
    Works,
)
from w2s_fast.scheduling.process import OwnProcess
from w2s_fast.scheduling.scheduler import Room, Scheduler
from w2s_fast.search import InFlight, RemoteSearch, Request, Search
from w2s_fast.stats import EngineStats, PoolStats

# A pass that was run so often without a recording gets one though others wait for it meanwhile.
_MISSED_OFTEN = 16


class _Outcomes(NamedTuple):
    """How many requests ended in which way."""

    finished: int = 0
    failed: int = 0
    aborted: int = 0

    def add(self, request: Request) -> _Outcomes:
        aborted = isinstance(request.error, Aborted)
        failed = request.error is not None and not aborted
        return _Outcomes(
            self.finished + (request.error is None), self.failed + failed, self.aborted + aborted
        )


class Runner:
    """The owner of the search, the scheduler, and every request that has not ended.

    Whoever waits for a request takes steps until it has ended, and so serves all the others as
    well; several threads take turns. Requests may be submitted and given up at any time from any
    thread, and both take effect between two steps.

    Of many rows a turn launches the step of one cohort, and finishes the step of another, which an
    earlier turn launched: the device runs one while the host is busy with the other. Whoever asks
    for something that concerns a step in flight has it finished first.

    A turn may be interrupted at any place, by Ctrl-C as by an error. Nobody cleans up where that
    happens: the turn ends by :meth:`_mend`, which asks what the requests that go on hold and frees
    everything else, and if that is interrupted, too, the next turn begins with it. So that it can
    tell, whatever a request is or holds changes by one assignment, before anything that follows
    from it is done. A step in flight goes on, unless it was just being launched or finished.

    Requests whose candidates the judge has, or for which a remote base draws, are left alone until
    that is done, or they are given up, and the others go on. Where there is nobody else, whoever
    takes steps waits for news.

    Attributes:
        process: the only one in which steps are taken.
    """

    def __init__(
        self,
        search: Search | RemoteSearch,
        scheduler: Scheduler,
        judge: Judge | None = None,
        *,
        cohorts: int | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """``judge``: None: one without scorers. ``cohorts``: in how many the requests run; None: by
        their rows, see :mod:`.cohorts`. ``ranks``: that all take these steps."""
        self._ranks = ranks
        self._search = search
        self._scheduler = scheduler
        self._judge = judge or Judge()
        self._news = self._judge.news
        self.process = OwnProcess()
        self._home = HomeStream(*search.devices)
        self._turn = threading.Lock()
        self._next_turn = threading.Lock()
        self._arrived: deque[Request] = deque()
        self._given_up: deque[GivenUp] = deque()
        self._orders: Orders | None = None  # of several ranks, where one of them leads
        self._weights_changed = threading.Event()  # somebody said so
        self._following = (
            False  # whether changed weights are being followed, or were not to the end
        )
        self._under_way: dict[Request, None] = {}  # arrived, and not ended or not told so
        self._stepping: Sequence[Request] = ()  # those of the step that is being worked at
        self._in_flight: tuple[InFlight, ...] = ()  # the oldest first; nobody is in two of them
        self._cohorts = cohorts
        self._followed = 0  # how often weights were
        self._whole = True  # whether the last turn came to its end
        self._outcomes = _Outcomes()
        self._set_aside = 0
        self._steps = 0
        self._rounds = 0
        self._busy_s = 0.0
        self._sampled_tokens = 0
        self._scored_tokens = 0

    def check(self) -> None:
        """EngineFailure: this is another process; or, as RankFailure, its ranks are apart."""
        self.process.check()
        if self._ranks is not None:
            self._ranks.check()

    @property
    def together(self) -> bool:
        """Whether all ranks are there, as far as is known."""
        return self._ranks is None or not self._ranks.broken

    def turn(self) -> Hold:
        """For ``with``: nobody else takes a step meanwhile. Not reentrant.

        Raises:
            EngineFailure: this is another process.
        """
        return self.turn_with(())

    def turn_with(self, rooms: Sequence[Room], work: Work | None = None) -> Hold:
        """For ``with``: a turn in which so many pages and slots are free.

        ``work``: what is done in it, where ranks follow that have to do the same.

        Running requests are set aside for it, the least urgent first, and go on afterwards. Steps
        in flight are finished, and those in the middle of a round end it before that, in steps in
        which nobody begins another. What an exception leaves behind in the pools is given back.

        Raises:
            OutOfPages: on entering: there would not be so much if nothing ran.
            EngineFailure: this is another process.
        """
        self.process.check()
        # A thread that takes one turn after the other would get a lock again before those who wait
        # for it woke up: so the next one in line is chosen while the turn is still under way.
        return Hold(
            self._turn,
            queue=self._next_turn,
            begin=partial(self._begin_turn, rooms, work) if rooms else self._begin_turn,
            end=self._end_turn,
            after=self.settle,
        )

    def submit(self, request: Request) -> None:
        """Take a request on; it has been checked. It enters with the next step."""
        request.stats.arrive()
        self._arrived.append(request)
        self._news.tell()

    def give_up(self, request: Request, error: W2SFastError | None = None) -> None:
        """End a submitted request with an error, :class:`Aborted` if None; nothing if it has ended.

        Takes effect when the step under way is over, or with :meth:`settle`.
        """
        self._given_up.append((request, error or Aborted("the request was given up")))
        self._news.tell()

    def settle(self) -> None:
        """Let abortions take effect, now or when the turn under way is over.

        Never waits for a turn; for the device, where one of these requests is in flight. So it can
        be called where generators are closed: by the garbage collector, which may come in the
        middle of a step, in the thread that takes it. In another process nothing is left to be
        freed.
        """
        had = bool(self._given_up) and self.process.is_here
        while had and self._given_up:
            with Hold(self._turn, wait=False, begin=self._begin_turn, end=self._end_turn) as had:
                if had:
                    self._tell_orders(Order("settle"))
                    self._settle()

    def advance(
        self, awaited: Collection[Request], unless: Callable[[], bool] | None = None
    ) -> None:
        """Take a step when it is our turn, unless one of the awaited requests ended before.

        In several cohorts launch one, and finish the oldest of those in flight. Where all wait for
        the judge, wait for news, too, unless one of those awaited has ended, or ``unless`` says so.
        """
        with self._news.heard() as bell:
            with self.turn():
                if any(request.ended for request in awaited):
                    return
                progress = self._advance()
            over = any(request.ended for request in awaited) or (unless is not None and unless())
            if not progress and not over:
                bell.get()

    @contextmanager
    def lead(self) -> Iterator[None]:
        """For ``with``: the first of several ranks is the only one that is asked, and has the
        others do what it does. At its end whatever is under way is given up.

        Raises:
            InvalidRequest: it leads already.
            RankFailure: the ranks are apart.
        """
        assert self._ranks is not None
        with self.turn():
            if self._orders is not None:
                raise InvalidRequest("this rank leads already; allowed: one Engine.lead at a time")
            self._ranks.check_same(TOGETHER)
            self._orders = Leading(self._ranks)
        try:
            yield
        finally:
            with self.turn():
                for request in (*self._under_way, *self._arrived):
                    self.give_up(request, Aborted("the ranks are led no longer"))
                self._tell_orders(Order("settle"))
                self._settle()
                self._tell_orders(Order("end"))
                self._orders = None

    def follow(self, make: MakeRequest, works: Works) -> None:
        """Do what rank 0 does as long as it leads.

        Args:
            make: a request, of what rank 0 has made of its prompt.
            works: what is done in turns, by the names that those who take them give it.

        Raises:
            RankFailure: the ranks are apart.
        """
        assert self._ranks is not None
        self._ranks.check_same(TOGETHER)
        self._orders = orders = Following(self._ranks, make)
        try:
            while (order := orders.next()).kind != "end":
                self._follow(order, works)
        finally:
            self._orders = None

    def _follow(self, order: Order, works: Works) -> None:
        if order.work is not None:
            with suppress(W2SFastError):  # it is the caller's, on rank 0
                works[order.work.name](*order.work.arguments)
            return
        with self.turn():
            if order.kind == "step":
                self._advance()
            else:
                self._settle()

    def wake(self) -> None:
        """Have those who wait for news look again whether they still want to."""
        self._news.tell()

    @inference  # once: each part of a turn would enter it by itself
    def _advance(self) -> bool:
        self._tell_orders(Order("step"))
        progress = self._step()
        self.record_missed()
        return progress

    def record_missed(self) -> None:
        """Within a turn, between two steps: record the passes that were missed.

        As long as nobody waits for a step; else one that was missed often, if there is any.
        """
        recorded = [own for model in self._search.models for own in model.recorded]
        while True:
            idle = not self._under_way and not self._arrived
            least = 2 if idle else _MISSED_OFTEN
            if self._in_flight and any(own.missed(least) for own in recorded):
                self._land()
            if not any(own.record_missed(least) for own in recorded) or not idle:
                return

    def weights_changed(self) -> None:
        """Nothing that was computed so far is used from the next step on. Never waits.

        InvalidRequest: ranks follow this one, and their weights are others.
        """
        if self._orders is not None:
            raise InvalidRequest(
                "weights_changed where a rank leads; allowed: on every rank, outside of "
                "Engine.lead and AsyncEngine"
            )
        self._weights_changed.set()
        self._news.tell()

    def stats(self) -> EngineStats:
        """Counts since the runner was made. It waits for no step: some may be of the one before."""
        return EngineStats(
            waiting=len(self._scheduler.waiting) + len(self._arrived),
            running=len(self._scheduler.running),
            finished=self._outcomes.finished,
            failed=self._outcomes.failed,
            aborted=self._outcomes.aborted,
            set_aside=self._set_aside,
            steps=self._steps,
            rounds=self._rounds,
            busy_s=self._busy_s,
            sampled_tokens=self._sampled_tokens,
            scored_tokens=self._scored_tokens,
            rows=self._search.decoded.rows,
            passes=self._search.decoded.passes,
            max_rows=self._scheduler.max_rows,
            pools={model.name: _pool_stats(model.pool) for model in self._search.all_models},
        )

    def _begin_turn(self, rooms: Sequence[Room] = (), work: Work | None = None) -> None:
        self._home.enter()
        if not self._whole:
            self._mend(None)
        self._whole = False
        if rooms:
            if work is None and self._orders is not None:
                raise EngineFailure("a turn of work that ranks which follow are not told of")
            self._tell_orders(Order("work", work))
            self._make_room(rooms)

    def _end_turn(self, error: BaseException | None) -> None:
        try:
            if error is not None:
                self._tell_ranks(error)
                self._mend(error)
            self._whole = True
        finally:
            self._home.leave()

    def _make_room(self, rooms: Sequence[Room]) -> None:
        self._settle()
        self._follow_models()
        self._land()
        self._search.foreign.make_room([room.pool for room in rooms if not room.there])
        while not all(room.there for room in rooms):
            if (request := self._scheduler.set_aside_for(rooms)) is not None:
                self._put_aside([request])
            elif in_round := self._scheduler.in_round:
                if going_on := [request for request in in_round if not request.rests]:
                    self._run(going_on)
                else:
                    self._await_news(in_round)
            else:
                raise OutOfPages("more pages or slots are wanted than the KV cache has")
            self._settle()  # a request may have been given up meanwhile
            self._close_decided()

    def _await_news(self, in_round: Sequence[Request]) -> None:
        """Within a turn: until something was decided, drawn or given up."""
        with self._news.heard() as bell:
            self._hand_over()
            rest = all(request.rests for request in in_round)
            if rest and not self._judge.decided and not self._given_up:
                bell.get()

    def _settle(self) -> None:
        # Nobody leaves a queue before it is dealt with: who is interrupted does it again.
        given_up = len(self._given_up)  # before the arrivals: who is given up has arrived before
        arrived = len(self._arrived)
        if self._orders is not None:
            arrived, given_up = self._orders.exchange(self._arrived, self._given_up)
        for _ in range(arrived):
            request = self._arrived[0]
            if request not in self._under_way:
                self._scheduler.submit(request)
                self._under_way[request] = None
            self._arrived.popleft()
        for _ in range(given_up):
            request, error = self._given_up[0]
            if any(request in step.requests for step in self._in_flight):
                self._land()
            if request in self._under_way and not request.ended:
                request.error = error
                self._search.abort(request)
                self._leave(request)
            self._given_up.popleft()

    def _step(self) -> bool:
        """Bring those requests a step further whose turn it is.

        Returns:
            Whether there was anything to do, or nobody is there to be waited for.
        """
        self._settle()
        self._follow_models()
        closed = self._close_decided()
        flying = [request for step in self._in_flight for request in step.requests]
        chosen, set_aside, apart = self._scheduler.choose(flying, self._cohorts_of)
        self._put_aside(set_aside)
        if not apart and not flying:
            self._run(chosen)
        else:
            if chosen:
                self._launch(chosen)
            self._land(1 if apart and chosen else 0)
        self._hand_over()
        waits = not (chosen or flying or closed)
        return not (waits and any(r.rests for r in self._scheduler.running))

    def _hand_over(self) -> None:
        """Let the judge have whatever it is to decide, in one go."""
        new = [
            (request, choice)
            for request in self._scheduler.running
            if (choice := request.choice) is not None and not choice.handed_over
        ]
        if new:
            self._judge.hand_over(new)

    def _close_decided(self) -> bool:
        """Close the rounds that were decided; whether there were any."""
        decided = self._judge.decided
        # Nobody leaves it before it is dealt with: who is interrupted does it again.
        if not (count := len(decided)):
            return False
        pairs = [decided[i] for i in range(count)]
        requests = [request for request, choice in pairs if request.choice is choice]
        self._work_at(requests, partial(self._search.close, requests))
        self._step_taken(requests)
        for _ in range(count):
            decided.popleft()
        return True

    def _cohorts_of(self, rows: int) -> int:
        if self._cohorts is not None:
            return self._cohorts
        return cohorts_of(rows) if self._search.ahead else 1

    def _follow_models(self) -> None:
        """Where weights were changed, running requests give up what they hold, and recompute it.

        What a request drew and kept before stays; the round under way begins again, also where it
        is in flight: nothing of that is read. One that has given out tokens of that round cannot
        take them back, and ends with an error.
        """
        # Who was interrupted here does not know how far that came, and does it all again.
        announced = self._weights_changed.is_set() or self._following
        self._following = True
        if announced:  # what is announced from here on is followed by the next step
            self._weights_changed.clear()
        changed = [model.name for model in self._search.all_models if model.follow(announced)]
        if changed:
            self._in_flight = ()
            self._followed += 1
        for request in list(self._scheduler.running) if changed else ():
            self._search.start_over(request)
            if len(request.agreed) > len(request.agreed_tokens()):
                why = "in the middle of a round of which tokens had been streamed"
                request.error = EngineFailure(f"weights of {', '.join(changed)} changed {why}")
            if request.error is not None:  # or it failed in the step that was in flight
                self._leave(request)
        self._following = False

    def _put_aside(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self._search.set_aside(request)
        self._set_aside += len(requests)

    def _run(self, chosen: Sequence[Request]) -> None:
        """Bring the chosen requests a step further."""
        self._work_at(chosen, partial(self._search.step, chosen))
        self._steps += bool(chosen)
        self._step_taken(chosen)

    def _launch(self, chosen: Sequence[Request]) -> None:
        """Launch a step of theirs, to be finished in a later turn."""

        def launch() -> None:
            self._in_flight = (*self._in_flight, self._search.launch(chosen))

        self._work_at(chosen, launch)

    def _land(self, left: int = 0) -> None:
        """Finish the oldest steps in flight, until so many are left."""
        while len(self._in_flight) > left:
            requests = self._in_flight[0].requests
            self._work_at(requests, self._finish_oldest)
            self._steps += 1
            self._step_taken(requests)

    def _finish_oldest(self) -> None:
        oldest, *others = self._in_flight
        self._in_flight = tuple(others)
        self._search.finish(oldest)

    def _work_at(self, requests: Sequence[Request], work: Callable[[], None]) -> None:
        """Do the work of a step of these requests, or a part of it.

        A failure inside the models that concerns no single request ends all that take part, with
        :class:`EngineFailure`; those that wait go on.
        """
        before = _counts(requests)
        begin = time.perf_counter()
        self._stepping = requests
        try:
            if self._ranks is not None:
                self._ranks.check_same(_sum_of(requests) + self._followed)
            work()
        except Exception as error:
            self._tell_ranks(error)
            self._mend(error)
        finally:
            self._busy_s += time.perf_counter() - begin
            rounds, sampled, scored = (a - b for a, b in zip(_counts(requests), before))
            self._rounds += rounds
            self._sampled_tokens += sampled
            self._scored_tokens += scored
        self._stepping = ()

    def _tell_orders(self, order: Order) -> None:
        """What this turn is about to do, to ranks that follow."""
        if self._orders is not None:
            self._orders.tell(order)

    def _tell_ranks(self, error: BaseException) -> None:
        """What goes wrong here only must not let the other ranks wait for this one. Errors of this
        package follow from what was asked, and come on all of them."""
        if self._ranks is not None and not isinstance(error, W2SFastError):
            self._ranks.leave(f"{type(error).__name__}: {error}")

    def _step_taken(self, requests: Sequence[Request]) -> None:
        """Let those go who are done, and tell the others."""
        for request, done in zip(requests, are_done([request.beams for request in requests])):
            if request.ended:  # it failed, and has been let go
                continue
            if done or request.error is not None:
                self._leave(request)
                continue
            if request.streams:
                request.agreed = request.agreed_tokens()
            if request.listener is not None:
                self._tell(request)

    def _mend(self, error: BaseException | None) -> None:
        """Bring back order after an interruption, wherever it was; None: by what is not known.

        Who took part in a step that was being launched or finished ends, since its models may be
        anywhere. Afterwards every slot is held by a request that goes on, or free. May itself be
        interrupted, and begun again.
        """
        for request in self._stepping:
            if not request.done:  # each its own error: callers raise it, and add to it
                request.error = _failure(error)
        stepping = set(self._stepping)
        self._in_flight = tuple(s for s in self._in_flight if stepping.isdisjoint(s.requests))
        self._stepping = ()
        requests = list(self._under_way)
        alive = [request for request in requests if not request.done]
        self._search.keep_only(alive)
        self._scheduler.restore(alive)
        for request in requests:
            if request.done:
                self._leave(request)

    def _leave(self, request: Request) -> None:
        """Let a request go that is done, and holds nothing. May be interrupted, and begun again."""
        self._scheduler.remove(request)
        if not request.ended:  # counted once: nothing comes between the two
            request.ended, self._outcomes = True, self._outcomes.add(request)
        self._tell(request)
        self._under_way.pop(request, None)

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
    sampled, scored = progress([request.beams for request in requests])
    foreign = sum(request.foreign_tokens for request in requests)
    return sum(request.stats.rounds for request in requests), sampled, scored + foreign


def _sum_of(requests: Sequence[Request]) -> int:
    """A number that tells whether ranks are at the same: who takes part, and how far each is.
    Weights that were changed on some of them only are to be told, too."""
    known = [(len(r.prompt), r.prompt[-1], r.params.seed, r.beams.round) for r in requests]
    return zlib.crc32(repr(known).encode())


def _failure(error: BaseException | None) -> EngineFailure:
    if error is None:
        return EngineFailure("the step was interrupted")
    if isinstance(error, RankFailure):
        return RankFailure(str(error))
    failure = EngineFailure(f"{type(error).__name__}: {error}")
    if isinstance(error, Exception):  # an interrupt is its receiver's, with all that it refers to
        failure.__cause__ = error
    return failure
