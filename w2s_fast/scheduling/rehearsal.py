"""A usual search before anybody waits for one: what happens for the first time happens then.

Kernels are compiled, libraries set up, and passes recorded. Nothing shows it afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np

from w2s_fast.errors import InvalidRequest
from w2s_fast.params import SearchParams
from w2s_fast.scheduling.footprint import pages_at_most
from w2s_fast.scheduling.orders import Work
from w2s_fast.scheduling.runner import Runner
from w2s_fast.scheduling.scheduler import Room, Scheduler
from w2s_fast.search import Request, Search

REHEARSE = "rehearse"  # the work of :func:`rehearse`
# Two rounds of what most people ask for: from the prompt, and from hypotheses.
_USUAL = SearchParams(
    beam_width=4, successors=4, chunk_length=5, max_new_tokens=10, ignore_eos=True
)
_ALONE = SearchParams(method="sample", n=16, max_new_tokens=10, ignore_eos=True)  # without guides
_PROMPT_TOKENS = 64
# A shape is recorded when it has come twice, and replayed the third time.
_TIMES = 3


def rehearse(runner: Runner, search: Search, scheduler: Scheduler, vocab_size: int) -> None:
    """Run a usual search on random tokens, in a turn of its own.

    Statistics, prefix caches and requests are afterwards as if it had not been. Running requests
    are set aside where it needs their pages. Nothing happens where a usual search has no room.

    Args:
        vocab_size: tokens are below.

    Raises:
        EngineFailure: this is another process.
    """
    limits = [model.max_positions for model in search.models if model.max_positions is not None]
    tokens = min([_PROMPT_TOKENS, *(limit - _USUAL.max_new_tokens for limit in limits)])
    if tokens < 1:
        return
    prompt = np.random.default_rng(0).integers(0, vocab_size, tokens).tolist()
    guides = search.guides.guides
    params = _USUAL if guides else _ALONE

    def request() -> Request:
        return Request(prompt, [prompt] * (len(search.models) - 1) if guides else [], params)

    try:
        scheduler.check(request())
    except InvalidRequest:
        return
    with runner.turn_with(_rooms(search, request()), Work(REHEARSE)), _without_traces(search):
        for _ in range(_TIMES):
            one = request()
            while not one.done:
                search.step([one])
            runner.record_missed()


def _rooms(search: Search, request: Request) -> list[Room]:
    return [
        Room(model.pool, pages_at_most(request, m, model.pool.page_size), request.rows)
        for m, model in enumerate(search.models[: len(request.prompts)])
    ]


@contextmanager
def _without_traces(search: Search) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(search.uncounted())
        for model in search.models:
            stack.enter_context(model.pool.without_cache())
        yield
