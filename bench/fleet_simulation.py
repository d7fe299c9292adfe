"""Requests that come to replicas through a router: when each of them leaves.

A replica takes rounds over all requests that it runs. Between two rounds those that are done leave,
and others enter: what its prefix cache does not have of their prompts is run before the round. A
router is a single process that decides about one request after the other.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

RANDOM, LOAD, PREFIX = "random", "load", "prefix"
ROUTERS = (RANDOM, LOAD, PREFIX)
# Times the mean load, and requests on top of it. With more the slowest answers take longer, and
# little more is found: the table of bounds in docs/fleet.md.
BOUND, SLACK = 1.0, 2


@dataclass(frozen=True)
class Traffic:
    """What is asked.

    Attributes:
        groups: of prompts that begin alike; the i-th is asked for as often as i ** -zipf says.
        shared, own: tokens that a prompt has in common with its group, and behind them.
        mean_answer, most_answer: tokens; after each the answer ends with the same chance, so that
            it would have mean_answer on average were it not cut at most_answer.
    """

    groups: int = 2000
    zipf: float = 1.0
    shared: int = 384
    own: int = 128
    mean_answer: int = 128
    most_answer: int = 512

    @property
    def prompt(self) -> int:
        return self.shared + self.own

    def mean_rounds(self, chunk: int) -> float:
        """Rounds of a request on average, with chunks of so many tokens."""
        stays = 1 - 1 / self.mean_answer
        return sum(stays**before for before in range(0, self.most_answer, chunk))

    @property
    def mean_tokens(self) -> float:
        """Tokens of an answer on average."""
        return self.mean_rounds(1)


class Arrivals(NamedTuple):
    """Requests in the order in which they come: when (seconds), of which group, tokens to write."""

    times: Floats
    groups: Integers
    answers: Integers


def popularity(traffic: Traffic) -> Floats:
    """Chance of each group."""
    weights = np.arange(1, traffic.groups + 1, dtype=np.float64) ** -traffic.zipf
    return np.asarray(weights / weights.sum())


def arrivals(traffic: Traffic, rate: float, count: int, seed: int) -> Arrivals:
    """So many requests, ``rate`` a second on average, at times that know nothing of each other."""
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1 / rate, count))
    groups = _groups(traffic, count, rng)
    answers = rng.geometric(1 / traffic.mean_answer, count)
    return Arrivals(times, groups, np.minimum(answers, traffic.most_answer))


def _groups(traffic: Traffic, count: int, rng: np.random.Generator) -> Integers:
    found = np.searchsorted(np.cumsum(popularity(traffic)), rng.random(count))
    return np.minimum(found, traffic.groups - 1).astype(np.int64)


@dataclass(frozen=True)
class Replica:
    """How fast one is.

    Attributes:
        round_s: seconds of a round of so many requests, by their number; that of none is never
            asked for, and the last is how many run at once.
        prompt_s: seconds of a pass over so many tokens of prompts.
        chunk: tokens of a round. pass_tokens: of prompts, that enter between two rounds; a longer
            prompt enters alone.
        cache_tokens: that the prefix cache holds.
    """

    round_s: Sequence[float]
    prompt_s: Callable[[int], float]
    chunk: int
    pass_tokens: int = 8192
    cache_tokens: int = 0


class PrefixCache:
    """Beginnings that groups share, and what stood behind them; what was used last stays.

    What is behind a beginning is of use to nobody, but takes room until it is the oldest.
    """

    def __init__(self, tokens: int) -> None:
        self._free = tokens
        self._entries: OrderedDict[int, int] = OrderedDict()
        self._own = 0

    def enter(self, group: int, shared: int, own: int) -> int:
        """Tokens of this prompt that are there; afterwards all of it is, as far as it fits."""
        # What is let go last stays longest: the end of a prompt goes before its beginning.
        if own:
            self._own -= 1  # no group has such a number
            self._entries[self._own] = own
            self._free -= own
        found = 0
        if group in self._entries:
            self._entries.move_to_end(group)
            found = shared
        elif shared:
            self._entries[group] = shared
            self._free -= shared
        while self._free < 0:
            _, tokens = self._entries.popitem(last=False)
            self._free += tokens
        return found


class Router:
    """Which replica a request goes to; ``loads``: requests that are at each, kept by others.

    ``load`` takes the less loaded of two that it picks by chance. ``prefix`` sends a group where it
    went before, to the first of those replicas that has less than ``bound`` times the mean load and
    ``slack`` requests on top of it; where none has, to the less loaded of two, from then on to that
    one as well. So does Ray Serve's prefix-aware router, but for its bound, which is on the
    difference between the most and the least loaded: of many replicas some two always differ.
    """

    def __init__(
        self, name: str, loads: list[int], seed: int, bound: float = BOUND, slack: int = SLACK
    ) -> None:
        assert name in ROUTERS, name
        self._name, self._loads = name, loads
        self._random = random.Random(seed).random
        self._bound, self._slack = bound, slack
        self._homes: dict[int, list[int]] = {}

    def choose(self, group: int, total: int) -> int:
        """``total``: requests that are at all replicas."""
        count = len(self._loads)
        if self._name == RANDOM:
            return int(self._random() * count)
        if self._name == LOAD:
            return self._of_two()
        most = self._bound * total / count + self._slack
        homes = self._homes.setdefault(group, [])
        for home in homes:
            if self._loads[home] < most:
                return home
        found = self._of_two()
        if found not in homes:
            homes.append(found)
        return found

    def _of_two(self) -> int:
        count = len(self._loads)
        a, b = int(self._random() * count), int(self._random() * count)
        return a if self._loads[a] <= self._loads[b] else b


@dataclass
class Outcome:
    """What became of requests, each in the place in which it came.

    Attributes:
        entered, finished: seconds, when its prompt began to be run, and its last round was over.
        replicas: which it went to.
        cached: tokens of its prompt that were there.
        request_seconds: requests at replicas, summed up over time: how many were there, event by
            event, times how long.
    """

    entered: Floats
    finished: Floats
    replicas: Integers
    cached: Integers
    request_seconds: float = 0.0


@dataclass
class _State:
    """Of a replica. ``leaving``: which requests are done after which of its rounds."""

    cache: PrefixCache
    waiting: deque[int] = field(default_factory=deque)
    leaving: dict[int, list[int]] = field(default_factory=dict)
    running: int = 0
    round: int = 0
    busy: bool = False


def simulate(
    replica: Replica,
    replicas: int,
    traffic: Traffic,
    asked: Arrivals,
    router: str,
    *,
    decision_s: float = 0.0,
    bound: float = BOUND,
    warm: bool = True,
    seed: int = 0,
) -> Outcome:
    """Until the last request has left.

    Args:
        decision_s: seconds that the router takes for each request, one after the other.
        bound: of a router that knows prompts.
        warm: whether caches begin full of what was asked for before, in no order; else empty.
    """
    count = len(asked.times)
    rounds = (-(-asked.answers // replica.chunk)).tolist()
    times, groups = asked.times.tolist(), asked.groups.tolist()
    states = [_State(PrefixCache(replica.cache_tokens)) for _ in range(replicas)]
    if warm:
        _warm(states, replica.cache_tokens, traffic, seed)
    loads = [0] * replicas
    route = Router(router, loads, seed, bound).choose
    entered, finished = [math.nan] * count, [math.nan] * count
    chosen, cached = [0] * count, [0] * count
    ends: list[tuple[float, int]] = []  # of rounds: when, and whose
    shared, own, prompt = traffic.shared, traffic.own, traffic.prompt
    most, round_s = len(replica.round_s) - 1, replica.round_s
    at_replicas, area, last, done, router_free = 0, 0.0, 0.0, 0, 0.0

    def begin(index: int, now: float) -> None:
        """Take in who waits, and begin a round; or rest, if there is nobody."""
        state = states[index]
        tokens = 0
        while state.waiting and state.running < most:
            if tokens and tokens + prompt > replica.pass_tokens:
                break  # what the cache has of the next is not known before: at worst, nothing
            request = state.waiting.popleft()
            entered[request] = now
            cached[request] = state.cache.enter(groups[request], shared, own)
            tokens += prompt - cached[request]
            state.running += 1
            state.leaving.setdefault(state.round + rounds[request], []).append(request)
        state.busy = state.running > 0
        if state.busy:
            seconds = round_s[state.running] + (replica.prompt_s(tokens) if tokens else 0.0)
            heapq.heappush(ends, (now + seconds, index))

    def end(now: float, index: int) -> None:
        nonlocal at_replicas, area, last
        area += at_replicas * (now - last)
        last = now
        state = states[index]
        state.round += 1
        left = state.leaving.pop(state.round, ())
        for request in left:
            finished[request] = now
        state.running -= len(left)
        loads[index] -= len(left)
        at_replicas -= len(left)
        begin(index, now)

    while done < count:
        # The router looks at loads when it decides, not when a request comes.
        now = max(times[done], router_free) + decision_s
        while ends and ends[0][0] <= now:
            end(*heapq.heappop(ends))
        area += at_replicas * (now - last)
        last = router_free = now
        index = route(groups[done], at_replicas)
        chosen[done] = index
        loads[index] += 1
        at_replicas += 1
        states[index].waiting.append(done)
        if not states[index].busy:
            begin(index, now)
        done += 1
    while ends:
        end(*heapq.heappop(ends))
    return Outcome(
        np.array(entered), np.array(finished), np.array(chosen), np.array(cached), area
    )  # fmt: skip


def _warm(states: Sequence[_State], tokens: int, traffic: Traffic, seed: int) -> None:
    """Let each cache see as many prompts as fill it: what it held before that is gone."""
    if not traffic.shared:
        return
    each = tokens // max(1, traffic.own) if traffic.own else 4 * tokens // traffic.shared
    rng = np.random.default_rng([seed, 1])
    for state in states:
        for group in _groups(traffic, each, rng).tolist():
            state.cache.enter(group, traffic.shared, traffic.own)


@dataclass(frozen=True)
class Summary:
    """Of a stretch in which the fleet neither fills nor empties.

    Attributes:
        tokens_per_s: of answers, each written evenly while it runs.
        p50, p99: seconds from a request's coming to its answer's end, of those that came in it.
        cached: share of the tokens of their prompts.
        at_replicas: requests there on average, from the first arrival to the last end.
    """

    tokens_per_s: float
    p50: float
    p99: float
    cached: float
    at_replicas: float


def summary(
    asked: Arrivals, outcome: Outcome, prompt: int, begin: float = 0.4, end: float = 0.9
) -> Summary:
    """``begin``, ``end``: parts of the time in which requests come."""
    last = asked.times[-1]
    low, high = begin * last, end * last
    came = (asked.times >= low) & (asked.times < high)
    ran = np.minimum(outcome.finished, high) - np.maximum(outcome.entered, low)
    written = asked.answers * np.maximum(0, ran) / (outcome.finished - outcome.entered)
    waited = (outcome.finished - asked.times)[came]
    p50, p99 = np.quantile(waited, [0.5, 0.99])
    span = outcome.finished.max() - asked.times[0]
    return Summary(
        float(written.sum() / (high - low)),
        float(p50),
        float(p99),
        float(outcome.cached[came].mean() / prompt),
        float(outcome.request_seconds / span),
    )
