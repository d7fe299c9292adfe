"""Pool: how many actors there are, what each needs, and how much it is given at a time."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.data import ActorPoolStrategy, Dataset

from w2s_fast.errors import InvalidRequest
from w2s_fast.params import SearchParams

T = TypeVar("T")

_ROWS = 256  # of an engine that is not told how many: as many as it takes on any device
_TASKS = 8  # under way in an actor: the more, the sooner results come; each costs Ray some time
# Times that prompts are given to another actor, or to the same one begun again. All that an actor
# holds when it dies are given again, so that innocent ones are, too.
RETRIES = 3


@dataclass(frozen=True)
class Pool:
    """Actors, an engine each.

    Attributes:
        actors: so many, or between two numbers, as there is to do.
        num_cpus, num_gpus: of each rank of an engine; see :func:`gpus_of`.
        max_rows: of each engine; None: as it chooses.
        tensor_parallel: ranks of an engine. The first is the actor, and it has the others started.
    """

    actors: int | tuple[int, int] = 1
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    max_rows: int | None = None
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        least, most = self.actors if isinstance(self.actors, tuple) else (self.actors, self.actors)
        if not 1 <= least <= most:
            raise InvalidRequest(
                f"actors is {self.actors!r}; allowed: an integer >= 1, or two, the least first"
            )
        if self.tensor_parallel > 1 and least != most:
            # Ray Data would count an actor's own resources only, and begin more than there is room.
            raise InvalidRequest(
                f"actors is {self.actors!r} with tensor_parallel; allowed: an integer >= 1"
            )

    def rows_of_task(self, params: SearchParams) -> int:
        """Prompts that an actor is given together: their results come back together, too."""
        return max(1, self._places(params) // _TASKS)

    def map_batches(
        self,
        dataset: Dataset,
        searcher: type,
        arguments: tuple[Any, ...],
        params: SearchParams,
        *,
        alone: bool = False,
    ) -> Dataset:
        """The dataset's batches through actors that are made so.

        Args:
            searcher: class of callables, with ``arguments`` of its constructor.
            params: of a usual prompt. alone: each prompt has an actor to itself, once.
        """
        size = 1 if alone else self.rows_of_task(params)
        # A task more than there is room for: its prompts enter as soon as others leave.
        calls = 1 if alone else -(-self._places(params) // size) + 1
        least, most = self.actors if isinstance(self.actors, tuple) else (self.actors, self.actors)
        with warnings.catch_warnings():
            # Ray 2.64 is to take no `max_task_retries` any more; until then it is the way to say
            # that what kills its actor is not tried for ever. pyproject.toml has that bound.
            warnings.filterwarnings("ignore", ".*ray_remote_args.*")
            return dataset.map_batches(
                searcher,
                fn_constructor_args=arguments,
                batch_size=size,
                batch_format="pyarrow",
                compute=ActorPoolStrategy(
                    min_size=least,
                    max_size=most,
                    max_tasks_in_flight_per_actor=calls if alone else calls + 1,
                    max_concurrent_calls_per_actor=calls,
                    enable_true_multi_threading=True,
                ),
                num_cpus=self.num_cpus,
                num_gpus=self.num_gpus,
                max_restarts=-1,
                max_task_retries=0 if alone else RETRIES,
            )

    def _places(self, params: SearchParams) -> int:
        return max(1, (self.max_rows or _ROWS) // params.rows)


def gpus_of(device: str) -> float:
    """GPUs of an actor: one, unless it is to run on a CPU, or nobody has any."""
    return float(device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0)


def run_there(work: Callable[[], T], gpus: float) -> T:
    """What ``work`` finds on a machine that has so many GPUs."""
    found: T = ray.get(ray.remote(work).options(num_cpus=0, num_gpus=gpus).remote())
    return found


@contextmanager
def connected(
    waiting: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[None]:
    """To the cluster that ``RAY_ADDRESS`` names, or that runs here, or to one of its own.

    Whoever is connected already stays so.

    Args:
        waiting: around what takes seconds.
    """
    if ray.is_initialized():
        yield
        return
    with waiting():
        # Who reads results wants to see neither how they are made nor what actors print.
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()
