"""The guides' score of given texts, token by token: many in one pass, between two steps of the
running requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from w2s_fast.errors import InvalidRequest, NumericalError
from w2s_fast.models import PagedModel
from w2s_fast.scheduling.orders import Work
from w2s_fast.scheduling.runner import Runner
from w2s_fast.scheduling.scheduler import Room
from w2s_fast.search import PagedGuide

SCORE = "score"  # the work of :func:`score_batch`: a guide, by what it is made of, and texts
# Tokens of a pass: so many that reading the weights no longer counts, so few that running requests
# do not wait long.
_MOST_TOKENS = 2048
# Share of the pages that a pass takes at most if it runs more than one text: where memory is tight,
# running requests have to be set aside for them.
_SHARE = 8


class Given(NamedTuple):
    """A text to be scored, as token ids of one guide; none of them is empty.

    Attributes:
        prompts: of each of its models.
        response: behind any of them.
    """

    prompts: list[list[int]]
    response: list[int]

    def pages(self, page_size: int) -> list[int]:
        """Pages that it holds in each model once it is scored; its last token is not run."""
        return [-(-(len(prompt) - 1 + len(self.response)) // page_size) for prompt in self.prompts]


def check_room(models: Sequence[PagedModel], text: Given) -> None:
    """Whether the text could be scored in all models of its guide if nothing else ran.

    Raises:
        InvalidRequest: names the model, what is needed and what there is.
    """
    for model, needed in zip(models, text.pages(models[0].pool.page_size)):
        pool = model.pool
        if needed > pool.num_pages:
            raise InvalidRequest(
                f"prompt and response need {needed * pool.page_size} tokens of KV cache in "
                f"{model.name}, which has {pool.num_pages * pool.page_size}; allowed: a shorter "
                "text, or a larger kv_cache_tokens"
            )


def score_given(runner: Runner, guide: PagedGuide, texts: Sequence[Given]) -> list[list[float]]:
    """What each token of each text adds to one guide's score, its weight included.

    :func:`check_room` has passed the texts.

    Raises:
        NumericalError: names the first model that gave NaN or infinity, and where.
    """
    return [own for batch in _batches(texts, guide) for own in score_batch(runner, guide, batch)]


def score_batch(runner: Runner, guide: PagedGuide, batch: Sequence[Given]) -> list[list[float]]:
    """The same of texts that run in one turn."""
    pages = zip(*(text.pages(guide.models[0].pool.page_size) for text in batch))
    rooms = [Room(m.pool, sum(own), len(batch)) for m, own in zip(guide.models, pages)]
    prompts = list(zip(*(text.prompts for text in batch)))
    names = [model.name for model in guide.models]
    work = Work(SCORE, (names, guide.weight, guide.vocab_size, batch))
    with runner.turn_with(rooms, work):
        slots = guide.prefill(prompts)
        before = [[prompt[-1] for prompt in own] for own in prompts]
        found = guide.append(slots, before, [text.response for text in batch])
        counts = [len(text.response) for text in batch]
        for model, logprobs in zip(guide.models, found):
            for own in torch.split(logprobs.cpu(), counts):
                if not own.isfinite().all():
                    raise NumericalError.at(model.name, int(own.isfinite().long().argmin()))
        # Others may be asked about behind the same prompts.
        for model, own_slots, own_prompts in zip(guide.models, slots, prompts):
            model.pool.remember(own_slots, [prompt[:-1] for prompt in own_prompts])
        guide.release(slots)
    ratios = found[0].double()
    if len(found) > 1:
        ratios = ratios - found[1].double()
    return [own.tolist() for own in torch.split(guide.weight * ratios, counts)]


def _batches(texts: Sequence[Given], guide: PagedGuide) -> Iterator[Sequence[Given]]:
    """The texts in their order, as many at a time as a pass may run, at least one."""
    pool = guide.models[0].pool  # the other is of the same size, and its pages, too
    most = min(_MOST_TOKENS // pool.page_size, pool.num_pages // _SHARE)
    begin = pages = 0
    for i, text in enumerate(texts):
        own = max(text.pages(pool.page_size))
        if begin < i and pages + own > most:
            yield texts[begin:i]
            begin, pages = i, 0
        pages += own
    if begin < len(texts):
        yield texts[begin:]
