"""Engines over tiny models, and what the tests of the search share."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.support.probed import probed_once
from tests.support.tiny_models import tiny_triple
from w2s_fast import Engine, Guide, SearchParams, SearchResult

PROMPTS = [[3, 1, 4], [15], [9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3], [2, 7], [18, 2, 8, 1, 8]]
# Longer than the shortest segment that rows share.
LONG_PROMPTS = [[p % 18 + 1 for p in range(40 + 9 * i)] for i in range(5)]
RAGGED_PROMPTS = [[p % 18 + 1 for p in range(n)] for n in (30, 9, 17, 24, 12)]


def make_engine(
    base: PreTrainedModel,
    tuned: PreTrainedModel,
    untuned: PreTrainedModel,
    more_guides: Sequence[Guide] = (),
    **options: Any,
) -> Engine:
    options = {"kv_cache_tokens": 4096, "page_size": 4, "device": "cpu", **options}
    guides = [Guide(tuned=tuned, untuned=untuned), *more_guides]
    with probed_once():
        return Engine(base=base, guides=guides, **options)


@functools.cache
def engine(
    eos: tuple[int, ...] = (0, 6, 13), dtype: torch.dtype = torch.float64, **options: Any
) -> Engine:
    return make_engine(*tiny_triple(eos=eos, dtype=dtype), **options)


def tiny_engine(eos: tuple[int, ...] = (0, 6, 13), **options: Any) -> Engine:
    """One of its own for a test: what is done to it, no other test sees."""
    return make_engine(*tiny_triple(eos=eos), **options)


def models_of(e: Engine) -> list[Any]:
    return [e.base, *(model for guide in e.guides for model in guide.models)]


@contextmanager
def forwarded(*models: PreTrainedModel) -> Iterator[list[int]]:
    """Counts the tokens put through each model."""
    totals = [0] * len(models)

    def hook(i: int) -> object:
        def count(_module: object, args: tuple[torch.Tensor, ...], _output: object) -> None:
            totals[i] += args[0].numel()

        return count

    handles = [
        model.get_input_embeddings().register_forward_hook(hook(i))
        for i, model in enumerate(models)
    ]
    try:
        yield totals
    finally:
        for handle in handles:
            handle.remove()


def quiet(e: Engine) -> bool:
    """Nobody waits and nobody runs."""
    stats = e.stats()
    return stats.waiting == stats.running == 0


def assert_all_pages_free(e: Engine) -> None:
    for model in models_of(e):
        assert model.pool.free_pages == model.pool.num_pages, model.name
        assert model.pool.free_slots == model.pool.manager.max_slots, model.name
        model.pool.manager.check()


class Floats(list[float]):
    """Equal up to the differences of batched matrix products."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Floats):
            return NotImplemented
        return list(self) == pytest.approx(list(other), abs=1e-4)

    __hash__ = None  # type: ignore[assignment]


def found(results: Sequence[SearchResult]) -> list[Any]:
    """What results say, to be compared."""
    return [
        (
            [(h.token_ids, h.finish_reason) for h in r.hypotheses],
            Floats(s for h in r.hypotheses for s in (*h.token_scores, *h.token_logprobs)),
            r.usage,
            r.trace and [(x.kept, [c.token_ids for c in x.candidates]) for x in r.trace.rounds],
        )
        for r in results
    ]


SEARCH = SearchParams(
    beam_width=2, successors=3, chunk_length=3, max_new_tokens=11, n=2, trace=True
)
LONG = replace(SEARCH, max_new_tokens=60)
MIXED = [
    SEARCH,
    SearchParams(method="bon", successors=5, max_new_tokens=9, n=3, seed=4, trace=True),
    SearchParams(method="sample", n=4, max_new_tokens=7, temperature=1.3, top_p=0.8, trace=True),
    SearchParams(beam_width=3, successors=2, chunk_length=1, max_new_tokens=6, top_k=4, trace=True),
    SearchParams(beam_width=1, successors=1, max_new_tokens=20, temperature=0.0, trace=True),
]
