"""What ranks that follow do in turns beside the steps, as rank 0 says it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from w2s_fast.models import PagedModel
from w2s_fast.scheduling.orders import Works
from w2s_fast.scheduling.reading import READ, read_one
from w2s_fast.scheduling.rehearsal import REHEARSE, rehearse
from w2s_fast.scheduling.runner import Runner
from w2s_fast.scheduling.scheduler import Scheduler
from w2s_fast.scheduling.scoring import SCORE, Given, score_batch
from w2s_fast.search import PagedGuide, Search


def works_of(runner: Runner, search: Search, scheduler: Scheduler, vocab_size: int) -> Works:
    """For :meth:`Runner.follow`; ``vocab_size``: tokens are below."""
    models = {model.name: model for model in search.all_models}
    return {
        SCORE: partial(_score, runner, models),
        READ: partial(_read, runner, models),
        REHEARSE: partial(rehearse, runner, search, scheduler, vocab_size),
    }


def _score(
    runner: Runner,
    models: dict[str, PagedModel],
    names: Sequence[str],
    weight: float,
    vocab_size: int,
    texts: Sequence[Given],
) -> None:
    tuned, *untuned = (models[name] for name in names)
    guide = PagedGuide(tuned, untuned[0] if untuned else None, weight, vocab_size)
    score_batch(runner, guide, texts)


def _read(
    runner: Runner,
    models: dict[str, PagedModel],
    name: str,
    text: Sequence[int],
    top: int,
    vocab_size: int,
) -> None:
    read_one(runner, models[name], text, top, vocab_size)
