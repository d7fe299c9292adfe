"""Ranks: the processes that run one model together, each with its part of the weights.

Every rank runs the same program: it makes the same engine and asks it for the same, in the same
order, or follows rank 0, which says what it is asked. What is decided follows from numbers, and
those that decide are rank 0's on all of them: so the ranks stay together even where their devices
round differently.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from w2s_fast.errors import EngineFailure, InvalidRequest, RankFailure

T = TypeVar("T")

# Rank 0 may have nothing to do for long. That it has died shows at once, by its closed connections.
_LONG = timedelta(days=1000)
_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Ranks:
    """The group of all ranks, as this one sees it.

    A rank that cannot go on leaves the group, and with a process that ends it is left, too: then
    the others' next exchange fails, and from there on everything that is asked of the group.

    Attributes:
        rank: which one this is, from 0. size: how many there are.
        device: of this rank.
        on_host: how many of them share this machine's memory.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        """Join the group; waits for all of the others.

        torch.distributed is set up from what torchrun puts into the environment, unless the
        program has done so: over gloo on a CPU, over nccl on CUDA.

        Args:
            size: how many ranks there have to be.
            device: of this rank: see :func:`w2s_fast.models.device_of_rank`.

        Raises:
            InvalidRequest: the environment is not that of so many ranks.
            EngineFailure: the others could not be reached.
        """
        self._broken: str | None = None
        if not dist.is_available():
            raise InvalidRequest(f"tensor_parallel is {size}, and this torch has no distributed")
        check_environment(size)
        self.device = device
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        try:
            if not dist.is_initialized():
                dist.init_process_group(backend)
            # One of our own: it can be left without taking the program's along.
            self._group: Any = dist.new_group(backend=backend)
            # What the host decides on never waits for a GPU, and who has died is noticed at once.
            self._host: Any = dist.new_group(backend="gloo") if backend == "nccl" else self._group
            self._orders: Any = dist.new_group(backend="gloo", timeout=_LONG)
        except Exception as error:
            raise EngineFailure(f"the ranks do not come together: {error}") from error
        self.rank, self.size = dist.get_rank(), size
        self.on_host = int(os.environ.get("LOCAL_WORLD_SIZE", size))

    @property
    def broken(self) -> bool:
        """Whether the group is of no more use."""
        return self._broken is not None

    def check(self) -> None:
        """RankFailure: the group is broken."""
        if self._broken is not None:
            raise RankFailure(
                f"rank {self.rank} of {self.size}: the group of ranks is broken, and of no more "
                f"use ({self._broken}); start all ranks anew"
            )

    def leave(self, why: object) -> None:
        """Break the group: nothing more is exchanged, and the others are told by their next
        exchange. ``why``: as errors say it from now on."""
        if self._broken is not None:
            return
        self._broken = str(why).strip().split("\n")[0] or type(why).__name__
        groups = {id(group): group for group in (self._group, self._host, self._orders)}
        self._group = self._host = self._orders = None
        for group in groups.values():
            with suppress(Exception):  # it may be as broken as it is
                if self.device.type == "cuda":
                    group.abort()
            with suppress(Exception):
                dist.destroy_process_group(group)

    @contextmanager
    def staying(self) -> Iterator[None]:
        """For ``with``: who is stopped within leaves, so that the others do not wait."""
        try:
            yield
        except BaseException as error:
            self.leave(f"{type(error).__name__}: {error}")
            raise

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place: the same bits on each. RankFailure."""
        self._exchange(dist.all_reduce, tensor, group=self._group)
        return tensor

    def agree(self, tensor: Tensor) -> Tensor:
        """What rank 0 has there, in place; of one shape on all ranks. RankFailure."""
        if not tensor.numel():
            return tensor
        there = tensor.contiguous()
        self._exchange(dist.broadcast, there, 0, group=self._group)
        return tensor if there is tensor else tensor.copy_(there)

    def least(self, numbers: Sequence[int]) -> list[int]:
        """The smallest over all ranks, of each of these numbers. RankFailure."""
        found = torch.tensor(numbers, dtype=torch.int64)
        self._exchange(dist.all_reduce, found, dist.ReduceOp.MIN, group=self._host)
        return [int(number) for number in found.tolist()]

    def share(self, make: Callable[[], T]) -> T:
        """What ``make`` gives on rank 0, the only one where it is called; it has to be picklable.

        Raises:
            EngineFailure: it failed on rank 0; there its own exception is raised.
            RankFailure: the group is broken.
        """
        self.check()
        found: list[Any] = [None, None]
        failure: Exception | None = None
        if self.rank == 0:
            try:
                found[0] = make()
            except Exception as error:
                failure = error
                found[1] = f"{type(error).__name__}: {error}"
        self._exchange(dist.broadcast_object_list, found, 0, group=self._host)
        if failure is not None:
            raise failure
        if found[1] is not None:
            raise EngineFailure(f"on rank 0: {found[1]}")
        made: T = found[0]
        return made

    def order(self, given: Any = None) -> Any:
        """What rank 0 gives, on all of them; it has to be picklable. The others wait for it,
        however long that is. RankFailure."""
        found = [given]
        self._exchange(dist.broadcast_object_list, found, 0, group=self._orders)
        return found[0]

    def check_same(self, number: int) -> None:
        """Whether all ranks are about to do the same, as a number below 2**62 tells it.

        Raises:
            RankFailure: they are not, and the group is broken now.
        """
        least, most = self.least([number, -number])
        if least != -most:
            self.leave(
                "the ranks were asked for different things; each has to make the same calls with "
                "the same arguments, in the same order"
            )
            self.check()

    def _exchange(self, work: Callable[..., Any], *args: Any, group: Any) -> None:
        self.check()
        try:
            work(*args, group=group)
        except Exception as error:
            self.leave(f"an exchange with the others failed: {error}")
            self.check()
        except BaseException:  # Ctrl-C: how far the others came nobody knows
            self.leave("an exchange was interrupted")
            raise


def check_environment(size: int) -> None:
    """InvalidRequest: this is no process of so many, as torchrun starts them."""
    how = f"start {size} ranks with: torchrun --nproc-per-node {size} script.py"
    if dist.is_initialized():
        world = dist.get_world_size()
    else:
        if missing := [name for name in _VARIABLES if name not in os.environ]:
            raise InvalidRequest(
                f"tensor_parallel is {size}, but {', '.join(missing)} of the environment is not "
                f"set, as it is for one of several ranks; {how}"
            )
        world = int(os.environ["WORLD_SIZE"])
    if world != size:
        raise InvalidRequest(f"tensor_parallel is {size}, and there are {world} ranks; {how}")
