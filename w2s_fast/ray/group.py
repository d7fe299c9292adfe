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
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util import get_node_ip_address
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from w2s_fast import Engine
from w2s_fast.errors import EngineFailure, InvalidRequest, RankFailure

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
                None: they are where there is room, on this machine first. Ray keeps a placement
                group of an actor's until its driver ends; resources of processes it does not.
            seconds: to wait for these resources.

        Raises:
            EngineFailure: resources are missing, or another rank failed: with its own cause.
            RankFailure: another rank has died.
            InvalidRequest: a rank without any resources.
            Exception: what ``make`` raises here.
        """
        if dist.is_initialized():
            raise EngineFailure(
                "this process is in a group of ranks, or was when that failed; start another one"
            )
        if not any(resources.values()):
            raise InvalidRequest("a rank has no resources; allowed: num_cpus or num_gpus above 0")
        self._ranks: list[Any] = []
        self._running: list[Any] = []
        self._before = dict(os.environ)
        self._over = threading.Event()
        self._making: threading.Thread | None = None
        try:
            self._start(size, resources, placement, seconds)
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

    def _start(
        self,
        size: int,
        resources: Mapping[str, float],
        placement: PlacementGroup | None,
        seconds: float,
    ) -> None:
        """Begin the other ranks' processes, and find out where they are."""
        kinds = {"num_cpus": "CPU", "num_gpus": "GPU"}
        options: dict[str, Any] = {option: resources.get(kind, 0) for option, kind in kinds.items()}
        options["resources"] = {k: v for k, v in resources.items() if k not in kinds.values()}
        for r in range(1, size):
            if placement is not None:
                where: Any = PlacementGroupSchedulingStrategy(placement, r)
            else:  # beside this process, where there is room
                here = ray.get_runtime_context().get_node_id()
                where = NodeAffinitySchedulingStrategy(here, True, _spill_on_unavailable=True)
            rank = ray.remote(_Rank).options(max_restarts=0, scheduling_strategy=where, **options)
            self._ranks.append(rank.remote())
        asked = [rank.place.remote() for rank in self._ranks]
        try:
            self._places = [_place(), *ray.get(asked, timeout=seconds)]
        except GetTimeoutError:
            missing = len(ray.wait(asked, num_returns=size - 1, timeout=0)[1])
            free = ray.available_resources()
            names = sorted({*resources, "CPU", "GPU"})
            raise EngineFailure(
                f"after {seconds:g} s {missing} of {size} ranks have not begun, each of which "
                f"needs {_told(resources)}; free in the cluster: "
                + _told({name: free.get(name, 0.0) for name in names})
            ) from None

    def _made(self, make: Callable[[], Engine]) -> Engine:
        """The engine, once all are together. What goes wrong on another rank is seen meanwhile."""
        size = len(self._places)
        host = get_node_ip_address()
        # A port that is free, and taken at once: nobody else can come in between.
        store = TCPStore(host, 0, size, is_master=True, wait_for_workers=False)
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
        # Whoever failed first, the others fail by it, and who that was nobody knows.
        self._making.join(_MOMENT)
        failure = made.exception() if made.done() else None
        ended, _ = ray.wait(self._running, num_returns=size - 1, timeout=_MOMENT)
        causes = self._causes(ended)
        why = "; ".join(causes.values())
        if any(not isinstance(cause, Exception) for cause in causes):
            raise RankFailure(why)
        if failure is None:
            raise EngineFailure(why or "a rank follows no longer")
        if all(type(cause) is type(failure) for cause in causes):
            raise failure
        if not isinstance(failure, EngineFailure):
            why = f"rank 0 of {size}: {type(failure).__name__}: {failure}; {why}"
        raise EngineFailure(why) from failure

    def _why(self, ended: Sequence[Any]) -> str | None:
        """Of these ranks' ends; None: none of them failed."""
        return "; ".join(self._causes(ended).values()) or None

    def _causes(self, ended: Sequence[Any]) -> dict[BaseException | str, str]:
        """Of these ranks' ends, and as they are told; without those that are another rank's fault,
        unless there are no others. Of one that died it is only told."""
        found: dict[Any, str] = {}
        for reference in ended:
            rank = f"rank {self._running.index(reference) + 1} of {len(self._running) + 1}"
            try:
                ray.get(reference)
            except RayTaskError as error:
                found[error.cause] = f"{rank}: {_cause(error)}"
            except RayError as error:
                found[rank] = f"{rank}: {_cause(error)}"
        own = {cause: told for cause, told in found.items() if not isinstance(cause, RankFailure)}
        return own or found


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
        store = TCPStore(seat["MASTER_ADDR"], seat["MASTER_PORT"], size, is_master=False)
    dist.init_process_group(backend, store=store, rank=seat["RANK"], world_size=size)


def _told(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items() if amount) or "none"


def _cause(error: RayError) -> str:
    """What happened, without the traceback that Ray's own errors tell."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    first = str(cause).strip().split("\n")[0]
    return f"{type(cause).__name__}: {first}"
