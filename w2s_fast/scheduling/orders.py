"""Orders: of several ranks the first is asked, and takes the others along.

What rank 0 is about to do it tells the others before it does it; they do the same, each with
requests of its own, made of the same tokens. So they hold the same as long as the same follows
from it, which is what the rest of this room sees to.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal, NamedTuple, NoReturn, Protocol, TypeAlias

from w2s_fast.errors import Aborted, RankFailure, W2SFastError
from w2s_fast.models import Ranks
from w2s_fast.params import SearchParams
from w2s_fast.search import ForeignPrompt, Request

GivenUp: TypeAlias = tuple[Request, W2SFastError]
# Of its prompts' tokens, the prompt as foreign guides have it, its parameters, and its priority.
MakeRequest: TypeAlias = Callable[
    [Sequence[Sequence[int]], ForeignPrompt | None, SearchParams, int], Request
]


class Work(NamedTuple):
    """What is done in a turn beside the steps, as another process can be told: see
    :meth:`.runner.Runner.follow`."""

    name: str
    arguments: tuple[Any, ...] = ()


Works: TypeAlias = Mapping[str, Callable[..., object]]

# What all ranks say as one of them begins to lead, and the others to follow.
TOGETHER = 1


class Order(NamedTuple):
    """What is done next; ``"end"``: nothing more."""

    kind: Literal["step", "settle", "work", "end"]
    work: Work | None = None


class _Arrival(NamedTuple):
    """A request, without what its caller gave: that may be anything, and is not needed."""

    number: int
    prompts: Sequence[Sequence[int]]
    foreign: ForeignPrompt | None
    params: SearchParams
    priority: int
    streams: bool


class _Changes(NamedTuple):
    """Who has come, and who is given up, by their numbers, and why."""

    arrived: list[_Arrival]
    given_up: list[tuple[int, str]]


class Orders(Protocol):
    """Either side: see :meth:`.runner.Runner.lead`."""

    def tell(self, order: Order) -> None:
        """This is about to be done here."""
        ...

    def exchange(self, arrived: deque[Request], given_up: deque[GivenUp]) -> tuple[int, int]:
        """How many of each, from the first on, count from now on, on all ranks."""
        ...


class Leading:
    """The first rank's side.

    Where the group is broken nothing is told any more: what is done next fails by itself, for each
    request by an error of its own.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._count = 0
        self._numbers: dict[Request, int] = {}  # of those that have not ended

    def tell(self, order: Order) -> None:
        with suppress(RankFailure):
            self._ranks.order(order)

    def exchange(self, arrived: deque[Request], given_up: deque[GivenUp]) -> tuple[int, int]:
        # In this order: who is given up has arrived before.
        leaving, coming = len(given_up), len(arrived)
        new = [self._number(arrived[i]) for i in range(coming) if arrived[i] not in self._numbers]
        gone = [given_up[i] for i in range(leaving)]
        told = [(self._numbers[r], str(why)) for r, why in gone if r in self._numbers]
        with suppress(RankFailure):
            self._ranks.order(_Changes(new, told))
        for request in [request for request in self._numbers if request.ended]:
            del self._numbers[request]
        return coming, leaving

    def _number(self, request: Request) -> _Arrival:
        self._numbers[request] = number = self._count
        self._count += 1
        params = request.params
        if callable(params.selection):
            # It is called here only, and what it is need not be picklable.
            params = replace(params, selection=_not_here)
        return _Arrival(
            number, request.prompts, request.foreign, params, request.priority, request.streams
        )


class Following:
    """The side of any other rank."""

    def __init__(self, ranks: Ranks, make: MakeRequest) -> None:
        self._ranks = ranks
        self._make = make
        self._requests: dict[int, Request] = {}

    def next(self) -> Order:
        """What is done next; waits for it, however long that is. RankFailure."""
        order: Order = self._ranks.order()
        return order

    def tell(self, order: Order) -> None:
        """Nobody is told."""

    def exchange(self, arrived: deque[Request], given_up: deque[GivenUp]) -> tuple[int, int]:
        changes: _Changes = self._ranks.order()
        for arrival in changes.arrived:
            arrived.append(self._made(arrival))
        for number, why in changes.given_up:
            if (found := self._requests.get(number)) is not None:
                given_up.append((found, Aborted(why)))
        self._forget(n for n, request in list(self._requests.items()) if request.ended)
        return len(arrived), len(given_up)

    def _made(self, arrival: _Arrival) -> Request:
        try:
            request = self._make(arrival.prompts, arrival.foreign, arrival.params, arrival.priority)
        except Exception as error:  # rank 0 could make it
            self._ranks.leave(f"a request cannot be made here: {type(error).__name__}: {error}")
            self._ranks.check()
            raise
        request.streams = arrival.streams
        request.stats.arrive()
        self._requests[arrival.number] = request
        return request

    def _forget(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            del self._requests[number]


def _not_here(*_: Any) -> NoReturn:
    raise AssertionError("the first rank chooses")
