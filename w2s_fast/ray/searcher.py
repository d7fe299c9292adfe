"""Searcher: what an actor does: it makes an engine, and answers what it is given."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeAlias

from w2s_fast import Engine
from w2s_fast.errors import EngineFailure, RankFailure
from w2s_fast.params import SearchParams
from w2s_fast.ray.group import RankGroup
from w2s_fast.ray.pool import Pool
from w2s_fast.result import SearchResult

Asked: TypeAlias = tuple[Any, SearchParams]  # a prompt as engines take it, and how to search

_FAILED = 70  # exit code of a process that cannot go on


class Searcher:
    """For ``map_batches``: batches come in several threads, and one engine runs all of them."""

    def __init__(self, make: Callable[[], Engine], pool: Pool | None = None) -> None:
        """``make``: the engine, in the process that it is to run in; of the pool's
        ``tensor_parallel`` ranks, if they are several."""
        if pool is None or pool.tensor_parallel <= 1:
            self._engine = make()
            return
        resources = {"CPU": pool.num_cpus, "GPU": pool.num_gpus}
        try:
            group = RankGroup(make, pool.tensor_parallel, resources)
            self._engine = group.engine
            self._lead = self._engine.lead()  # as long as this process is there
            self._lead.__enter__()
        except RankFailure as error:  # begun again, it has other ranks
            _end(error)
        # A pass on GPUs that waits for a rank that has died would do so for minutes.
        group.watch(_end)

    def search(self, asked: Sequence[Asked]) -> list[SearchResult]:
        """A result for each, in their order; a failed one carries its error.

        An engine that has failed as a whole fails for all that come later, too: then the process
        ends, and Ray begins it again and gives it once more what it held.
        """
        if not asked:
            return []
        prompts, params = [prompt for prompt, _ in asked], [own for _, own in asked]
        try:
            results = self._engine.generate(prompts, params, on_error="return", progress=False)
        except EngineFailure as error:
            _end(error)
        for result in results:
            if isinstance(result.error, EngineFailure):
                _end(result.error)
        return results


def _end(why: object) -> NoReturn:
    print(f"the engine has failed, and its process ends: {why}", file=sys.stderr, flush=True)
    os._exit(_FAILED)
