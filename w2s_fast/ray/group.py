"""A group of ranks: this process, and actors of its own, hold one base together."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.exceptions import RayError, RayTaskError
from ray.util import get_node_ip_address
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from w2s_fast import Engine
from w2s_fast.errors import EngineFailure, InvalidRequest

_SECONDS = 300.0  # that machines with so much may need until they have come
_MOMENT = 2.0  # in which a rank that broke the group has said why


class RankGroup:
    """Rank 0 is this process, and makes its engine; the others make theirs, and follow.

    They are actors of Ray, and end with this process. A process is in one group at most.

    Attributes:
        engine: rank 0's; to be led: :meth:`w2s_fast.Engine.lead`.
    """

    def __init__(
        self,
        make: Callable[[], Engine],
        size: int,
        resources: Mapping[str, float],
        *,
        placement: PlacementGroup | None = None,
        seconds: float = _SECONDS,
    ) -> None:
        """Waits until the engine is made on all ranks.

        Args:
            make: an engine of so many ranks; it is sent to the others by pickle.
            size: how many ranks there are.
            resources: of each of the others: ``CPU``, ``GPU``, and whatever else a cluster has.
            placement: whose first bundle is this process's, and whose next ones are the others';
                None: one of its own is made.
            seconds: to wait for these resources.

        Raises:
            EngineFailure: resources are missing, or a rank failed: with its own cause.
            InvalidRequest: a rank without any resources.
            Exception: what ``make`` raises here.
        """
        if dist.is_initialized():
            raise EngineFailure("this process is in a group of ranks, or was when that failed; start another process")
        self._own_placement = placement is None
        self._placement = placement or _placement_of_own(size - 1, resources)
        self._ranks: list[Any] = []
        self._running: list[Any] = []
        self._before = dict(os.environ)
        self._over = threading.Event()
        self._making: threading.Thread | None = None
        try:
            self._start(size, resources, seconds)
            self.engine = self._made(make)
        except BaseException as error:
            self.close()
            if isinstance(error, RayError):
                raise EngineFailure(f"a rank could not start: {_cause(error)}") from error
            raise

    @property
    def alive(self) -> bool:
        """Whether all of the others are there; known at once, while nothing is asked."""
        return not self._over.is_set() and not ray.wait(self._running, timeout=0)[0]

    def watch(self, lost: Callable[[str], None]) -> None:
        """Have it called, in a thread, once another rank has failed or died; it is told why. That
        rank 0 leads no longer, or that this is closed, is no failure."""

        def wait() -> None:
            ended, _ = ray.wait(self._running)
            why = self._why(ended)
            if why is not None and not self._over.is_set():
                lost(why)

        threading.Thread(target=wait, name="w2s-fast ranks", daemon=True).start()

    def close(self) -> None:
        """End the other ranks; the engine is of no more use."""
        self._over.set()
        for rank in self._ranks:
            with suppress(Exception):
                ray.kill(rank)
        if self._own_placement:
            with suppress(Exception):
                remove_placement_group(self._placement)
        if self._making is not None:
            # What it waits for has gone. A thread that waits all the same is left to itself.
            self._making.join(_MOMENT)
        if dist.is_initialized() and not (self._making and self._making.is_alive()):
            with suppress(Exception):
                dist.destroy_process_group()
        for name in _VARIABLES:
            os.environ.pop(name, None)
            if name in self._before:
                os.environ[name] = self._before[name]

    def _start(self, size: int, resources: Mapping[str, float], seconds: float) -> None:
        """Begin the other ranks' processes, and find out where they are."""
        if not self._placement.wait(seconds):
            free = ray.available_resources()
            names = sorted({*resources, "CPU", "GPU"})
            raise EngineFailure(
                f"after {seconds:g} s there is no room for {size - 1} ranks more, each with "
                f"{_told(resources)}; free in the cluster: "
                + _told({name: free.get(name, 0.0) for name in names})
            )
        first = 0 if self._own_placement else 1
        kinds = {"num_cpus": "CPU", "num_gpus": "GPU"}
        self._ranks = [
            ray.remote(_Rank)
            .options(
                **{option: resources.get(kind, 0) for option, kind in kinds.items()},
                resources={k: v for k, v in resources.items() if k not in kinds.values()},
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._placement, placement_group_bundle_index=first + r
                ),
            )
            .remote()
            for r in range(size - 1)
        ]
        self._places = [_place(), *ray.get([rank.place.remote() for rank in self._ranks])]

    def _made(self, make: Callable[[], Engine]) -> Engine:
        """The engine, once all are together. What goes wrong on another rank is seen meanwhile."""
        size = len(self._places)
        host = get_node_ip_address()
        # A port that is free, and taken at once: nobody else can come in between.
        store = dist.TCPStore(host, 0, size, is_master=True, wait_for_workers=False)
        shared = {"WORLD_SIZE": size, "MASTER_ADDR": host, "MASTER_PORT": store.port}
        own, *others = [{**shared, **seat} for seat in _seats(self._places)]
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        self._running = [
            rank.follow.remote(make, seat, backend) for rank, seat in zip(self._ranks, others)
        ]
        made: Future[Engine] = Future()

        def work() -> None:
            try:
                _join(own, backend, store)
                made.set_result(make())
            except BaseException as error:
                made.set_exception(error)

        # In a thread: it may wait for a rank that never comes.
        self._making = threading.Thread(target=work, name="w2s-fast rank 0", daemon=True)
        self._making.start()
        ended: list[Any] = []
        while not (ended or made.done()):
            ended, _ = ray.wait(self._running, timeout=0.1)
        if made.done() and not ended and made.exception() is None:
            return made.result()
        # Whoever failed first, the others fail by it; what they say of that says little.
        self._making.join(_MOMENT)
        failure = made.exception() if made.done() else None
        if failure is not None and not isinstance(failure, EngineFailure):
            raise failure
        ended, _ = ray.wait(self._running, num_returns=size - 1, timeout=_MOMENT)
        if (why := self._why(ended)) is not None or failure is None:
            raise EngineFailure(why or "a rank follows no longer") from failure
        raise failure

    def _why(self, ended: Sequence[Any]) -> str | None:
        """Of these ranks' ends: one that is not another one's fault, if there is one."""
        found: list[tuple[bool, str]] = []
        for reference in ended:
            try:
                ray.get(reference)
            except RayError as error:
                cause = error.cause if isinstance(error, RayTaskError) else error
                rank = self._running.index(reference) + 1
                told = f"rank {rank} of {len(self._running) + 1}: {_cause(error)}"
                found.append((isinstance(cause, EngineFailure), told))
        return min(found)[1] if found else None


class _Rank:
    """An actor: any rank but the first."""

    def place(self) -> tuple[str, int]:
        return _place()

    def follow(self, make: Callable[[], Engine], seat: Mapping[str, Any], backend: str) -> None:
        """Make the engine, and do what rank 0 does, until it leads no longer."""
        try:
            _join(seat, backend)
            make().follow()
        finally:
            # The connections close, and so rank 0 does not wait for what will not come.
            if dist.is_initialized():
                dist.destroy_process_group()


_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def _place() -> tuple[str, int]:
    """The node of this process, and how many GPUs it sees."""
    return ray.get_runtime_context().get_node_id(), torch.cuda.device_count()


def _seats(places: Sequence[tuple[str, int]]) -> list[dict[str, int]]:
    """Of each rank its number, and which one of how many it is on its machine."""
    nodes = [node for node, _ in places]
    return [
        {
            "RANK": rank,
            # Ray shows a process its own GPUs only: a single one is the first that it sees.
            "LOCAL_RANK": 0 if gpus == 1 else nodes[:rank].count(node),
            "LOCAL_WORLD_SIZE": nodes.count(node),
        }
        for rank, (node, gpus) in enumerate(places)
    ]


def _join(seat: Mapping[str, Any], backend: str, store: Any = None) -> None:
    """Set up what torchrun would, and torch.distributed. ``store``: of rank 0 its own."""
    os.environ.update({name: str(seat[name]) for name in _VARIABLES})
    size = seat["WORLD_SIZE"]
    if store is None:
        store = dist.TCPStore(seat["MASTER_ADDR"], seat["MASTER_PORT"], size, is_master=False)
    dist.init_process_group(backend, store=store, rank=seat["RANK"], world_size=size)


def _placement_of_own(count: int, resources: Mapping[str, float]) -> PlacementGroup:
    """Room for so many ranks.

    An actor that is begun again has the room that it had before, whose ranks ended with it.
    """
    bundle = {name: amount for name, amount in resources.items() if amount}
    if not bundle:
        raise InvalidRequest("num_cpus and num_gpus of a rank are 0; allowed: one of them above 0")
    actor = ray.get_runtime_context().get_actor_id()
    name = f"w2s-fast ranks of {actor}" if actor else ""
    if name:
        with suppress(ValueError):  # there is none yet
            return get_placement_group(name)
    return placement_group([bundle] * count, "PACK", name)


def _told(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items() if amount) or "none"


def _cause(error: RayError) -> str:
    """What happened, without the traceback that Ray's own errors tell."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    first = str(cause).strip().split("\n")[0]
    return f"{type(cause).__name__}: {first}"
