"""A dataset of Ray Data in, with prompts; the same out, with results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from typing import Any

import pyarrow as pa
from ray.data import Dataset

from w2s_fast import Chat, Engine, Guide
from w2s_fast.errors import InvalidRequest
from w2s_fast.params import SearchParams
from w2s_fast.ray.pool import Pool, gpus_of
from w2s_fast.ray.searcher import Asked, Searcher
from w2s_fast.result import Hypothesis, SearchResult, Usage

_PARAMS = frozenset(field.name for field in fields(SearchParams))
_PROMPTS = ("prompt", "messages")
_USAGE = [field.name for field in fields(Usage) if field.type in (int, "int")]

_HYPOTHESIS = {
    "text": pa.string(),
    "token_ids": pa.list_(pa.int64()),
    "score": pa.float64(),
    "finish_reason": pa.string(),
}
RESULTS = {
    **_HYPOTHESIS,
    "hypotheses": pa.list_(pa.struct(_HYPOTHESIS)),
    "usage": pa.struct(dict.fromkeys(_USAGE, pa.int64())),
    "error": pa.struct({"type": pa.string(), "message": pa.string()}),
}


def generate(
    dataset: Dataset,
    base: str,
    guides: Guide | Sequence[Guide] | None = None,
    params: SearchParams | None = None,
    *,
    actors: int | tuple[int, int] = 1,
    num_cpus: float = 1.0,
    num_gpus: float | None = None,
    **options: Any,
) -> Dataset:
    """Search a response for every row, on a pool of actors, an engine each.

    Example::

        prompts = ray.data.read_parquet("prompts.parquet")
        w2s_fast.ray.generate(prompts, "gpt2-xl", Guide("gpt2-imdb", "gpt2"), actors=8).write_json(
            "answers"
        )

    It is lazy, as all of Ray Data: actors start when somebody reads or writes what is returned, and
    results are in it as they finish. A row whose request fails has an ``error`` and harms no other;
    an actor that dies is begun again.

    Args:
        dataset: a row has a ``prompt`` (text, or token ids) or ``messages`` of a chat, and any
            field of :class:`w2s_fast.SearchParams` that is to be another one than in ``params``;
            null is as if it were not there. All other columns are kept.
        base, guides: paths or hub ids that lead to the models on every machine.
        params: of rows that set nothing else.
        actors: so many, or between two numbers.
        num_cpus, num_gpus: of each, or of each rank of its engine; GPUs not given: one, where the
            cluster has any and ``device`` is not ``"cpu"``.
        options: of :class:`w2s_fast.Engine`. With ``tensor_parallel`` each actor starts the other
            ranks of its engine, so the cluster needs room for ``actors * tensor_parallel`` of them.

    Returns:
        Its rows, in any order, with columns more: ``text``, ``token_ids``, ``score`` (nats) and
        ``finish_reason`` of the best hypothesis, ``hypotheses`` best first, ``usage`` in tokens,
        and ``error`` (``type`` and ``message``); null where there is none. Columns of search
        parameters are not kept.

    Raises:
        InvalidRequest: ``actors`` cannot be used, or a column is called as a result is.
    """
    params = params or SearchParams()
    if num_gpus is None:
        num_gpus = gpus_of(options.get("device", "auto"))
    if num_gpus == 0:
        options.setdefault("device", "cpu")
    pool = Pool(
        actors,
        num_cpus,
        num_gpus,
        options.get("max_rows"),
        tensor_parallel=options.get("tensor_parallel", 1),
    )
    parts = dataset.repartition(target_num_rows_per_block=pool.rows_of_task(params))
    make = partial(Engine, base, guides, **options)
    return pool.map_batches(parts, RowSearcher, (make, params, pool), params)


class RowSearcher(Searcher):
    """From and to columns."""

    def __init__(self, make: Any, params: SearchParams, pool: Pool | None = None) -> None:
        super().__init__(make, pool)
        self._params = params

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.to_pylist()
        read = [_read(row, self._params) for row in rows]
        asked = [one for one in read if not isinstance(one, InvalidRequest)]
        answers = iter(self.search(asked))
        told = [
            _told(one if isinstance(one, InvalidRequest) else next(answers), one) for one in read
        ]
        kept = [name for name in batch.column_names if name not in {*_PARAMS, *RESULTS}]
        found = batch.select(kept)
        for name, kind in RESULTS.items():
            found = found.append_column(name, pa.array([one.get(name) for one in told], kind))
        return found


def _read(row: dict[str, Any], defaults: SearchParams) -> Asked | InvalidRequest:
    given = {name: row[name] for name in _PROMPTS if row.get(name) is not None}
    own = {name: row[name] for name in _PARAMS if row.get(name) is not None}
    if len(given) != 1:
        return InvalidRequest(f"a row has {len(given)} of prompt and messages; allowed: one")
    ((name, prompt),) = given.items()
    try:
        return Chat(prompt) if name == "messages" else prompt, replace(defaults, **own)
    except InvalidRequest as error:
        return error
    except TypeError as error:  # a field of a type that the checks themselves trip over
        return InvalidRequest(f"cannot use {own}: {error}")


def _told(answer: SearchResult | InvalidRequest, asked: Any) -> dict[str, Any]:
    error = answer if isinstance(answer, InvalidRequest) else answer.error
    if error is not None or isinstance(answer, InvalidRequest):
        return {"error": {"type": type(error).__name__, "message": str(error)}}
    hypotheses = [_shown(one) for one in answer.hypotheses]
    return {**hypotheses[0], "hypotheses": hypotheses, "usage": asdict(answer.usage)}


def _shown(one: Hypothesis) -> dict[str, Any]:
    return {name: getattr(one, name) for name in _HYPOTHESIS}
