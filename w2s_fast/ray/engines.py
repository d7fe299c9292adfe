"""Engines: a pool of them that answers as one :class:`w2s_fast.Engine` does."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import pyarrow as pa
import ray
from ray import cloudpickle
from ray.exceptions import RayError

from w2s_fast import Engine
from w2s_fast.errors import EngineFailure
from w2s_fast.params import SearchParams
from w2s_fast.ray.pool import RETRIES, Pool
from w2s_fast.ray.searcher import Asked, Searcher
from w2s_fast.result import SearchResult, Usage
from w2s_fast.stats import EngineStats

log = logging.getLogger("w2s_fast.ray")

_NOTHING = EngineStats(0, 0, 0, 0, 0, 0, 0, 0, 0.0, 0, 0, 0, 0, 0, {})


class Engines:
    """Actors, an engine each, for the prompts of one caller.

    Attributes:
        tokenizer: the base's, where it is known here.
    """

    def __init__(
        self,
        make: Callable[[], Engine],
        pool: Pool,
        params: SearchParams,
        tokenizer: Any = None,
    ) -> None:
        """Starts nothing. To be used while connected: :func:`w2s_fast.ray.connected`.

        Args:
            make: an engine, in the process of an actor; it is sent there by pickle. An engine of
                several ranks is made on each, as many as ``pool.tensor_parallel``.
            params: of a usual prompt: how many an actor is given at a time.
        """
        self.tokenizer = tokenizer
        self._make = make
        self._pool = pool
        self._params = params
        self._stats = _NOTHING

    def as_completed(
        self,
        prompts: Iterable[Any],
        params: Iterable[SearchParams],
        *,
        at_once: int | None = None,
    ) -> Generator[tuple[int, SearchResult], None, None]:
        """Like :meth:`w2s_fast.Engine.as_completed`: each prompt has exactly one result.

        Prompts are read whole before the first result comes; they lie in Ray's object store. An
        actor that dies is begun again, and what it held is answered then; what it held when it had
        died too often is asked again at the end, each by itself, and what kills its actor even then
        has an :class:`EngineFailure` as its result.

        Args:
            at_once: without effect: results come one after the other anyway.

        Raises:
            EngineFailure: actors cannot make their engines, or Ray failed.
        """
        asked = dict(enumerate(zip(prompts, params)))
        for alone in (False, True):
            for index, result in self._answered(asked, alone):
                # Ray gives what a task returned once; that there is one result is ours to know.
                if asked.pop(index, None) is not None:
                    self._count(result)
                    yield index, result
            if not asked:
                return
            if not alone:
                log.warning("asking again, one by one", extra={"prompts": len(asked)})
        for index in asked:
            error = EngineFailure(
                f"no actor could answer it in {RETRIES + 2} tries, as one that dies of it cannot; "
                "Ray's logs say more"
            )
            yield index, SearchResult([], Usage(0, 0, 0, 0), error=error)

    def stats(self) -> EngineStats:
        """Of what has come back: ``finished``, ``failed``, and tokens; all else is 0."""
        return self._stats

    def _answered(self, asked: dict[int, Asked], alone: bool) -> Iterator[tuple[int, SearchResult]]:
        """Results as they come, without those whose actor died too often."""
        if not asked:
            return
        size = 1 if alone else self._pool.rows_of_task(self._params)
        given = ray.data.from_arrow(list(_tables(asked, size)))
        given.context.enable_progress_bars = False
        given.context.max_errored_blocks = -1  # they are missed here, and asked again
        found = self._pool.map_batches(
            given, PickledSearcher, (self._make, self._pool), self._params, alone=alone
        )
        try:
            for batch in found.iter_batches(batch_size=None, batch_format="pyarrow"):
                for row in batch.to_pylist():
                    yield row["index"], cloudpickle.loads(row["result"])
        except RayError as error:
            raise EngineFailure(f"Ray gave up: {_cause(error)}") from error

    def _count(self, result: SearchResult) -> None:
        bad = result.error is not None
        self._stats = replace(
            self._stats,
            finished=self._stats.finished + (not bad),
            failed=self._stats.failed + bad,
            rounds=self._stats.rounds + (result.stats.rounds if result.stats else 0),
            sampled_tokens=self._stats.sampled_tokens + result.usage.sampled_tokens,
            scored_tokens=self._stats.scored_tokens + result.usage.scored_tokens,
        )


class PickledSearcher(Searcher):
    """From and to Python's own objects, so that nothing is lost on the way."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        asked = [cloudpickle.loads(one) for one in batch["asked"].to_pylist()]
        results = [cloudpickle.dumps(result) for result in self.search(asked)]
        return pa.table({"index": batch["index"], "result": pa.array(results, pa.binary())})


def _tables(asked: dict[int, Asked], size: int) -> Iterator[pa.Table]:
    """Blocks of so many prompts."""
    items = iter(asked.items())
    while some := list(islice(items, size)):
        pickled = [cloudpickle.dumps(own) for _, own in some]
        yield pa.table(
            {"index": [index for index, _ in some], "asked": pa.array(pickled, pa.binary())}
        )


def _cause(error: BaseException) -> str:
    """The last line that says what happened; Ray's errors tell whole tracebacks."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
