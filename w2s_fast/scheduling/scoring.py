"""The guides' score of given texts: many in one pass, between two steps of the running requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from w2s_fast.errors import InvalidRequest, NumericalError
from w2s_fast.models import PagedModel
from w2s_fast.scheduling.runner import Runner
from w2s_fast.scheduling.scheduler import Room
from w2s_fast.search import PagedGuide

# Tokens of a pass: so many that reading the weights no longer counts, so few that running requests
# do not wait long.
_MOST_TOKENS = 2048
# Share of the pages that a pass takes at most if it runs more than one text: where memory is tight,
# running requests have to be set aside for them.
_SHARE = 8


class Given(NamedTuple):
    """A text to be scored, as token ids of one guide; neither of them is empty."""

    prompt: list[int]
    response: list[int]

    def pages(self, page_size: int) -> int:
        """Pages that it holds once it is scored; its last token is not run."""
        return -(-(len(self.prompt) - 1 + len(self.response)) // page_size)


def check_room(model: PagedModel, text: Given) -> None:
    """Whether the text could be scored if nothing else ran.

    Raises:
        InvalidRequest: names the model, what is needed and what there is.
    """
    pool = model.pool
    needed = text.pages(pool.page_size)
    if needed > pool.num_pages:
        raise InvalidRequest(
            f"prompt and response need {needed * pool.page_size} tokens of KV cache in "
            f"{model.name}, which has {pool.num_pages * pool.page_size}; allowed: a shorter text, "
            "or a larger kv_cache_tokens"
        )


def score_given(runner: Runner, guide: PagedGuide, texts: Sequence[Given]) -> list[float]:
    """One guide's score of each text, its weight included; :func:`check_room` has passed them.

    Raises:
        NumericalError: names the first model that gave NaN or infinity, and where.
    """
    scores: list[float] = []
    for batch in _batches(texts, guide):
        rooms = [
            Room(model.pool, _pages(batch, model.pool.page_size), len(batch))
            for model in guide.models
        ]
        with runner.turn_with(rooms):
            slots = guide.prefill([text.prompt for text in batch])
            before = [text.prompt[-1] for text in batch]
            tuned, untuned = guide.append(slots, before, [text.response for text in batch])
            guide.release(slots)
        counts = [len(text.response) for text in batch]
        for model, logprobs in zip(guide.models, (tuned, untuned)):
            for own in torch.split(logprobs.cpu(), counts):
                if not own.isfinite().all():
                    raise NumericalError.at(model.name, int(own.isfinite().long().argmin()))
        ratios = torch.split(tuned.double() - untuned.double(), counts)
        scores += [guide.weight * float(own.sum()) for own in ratios]
    return scores


def _pages(texts: Sequence[Given], page_size: int) -> int:
    return sum(text.pages(page_size) for text in texts)


def _batches(texts: Sequence[Given], guide: PagedGuide) -> Iterator[Sequence[Given]]:
    """The texts in their order, as many at a time as a pass may run, at least one."""
    pool = guide.models[0].pool  # the other is of the same size
    most = min(_MOST_TOKENS // pool.page_size, pool.num_pages // _SHARE)
    begin = pages = 0
    for i, text in enumerate(texts):
        own = text.pages(pool.page_size)
        if begin < i and pages + own > most:
            yield texts[begin:i]
            begin, pages = i, 0
        pages += own
    if begin < len(texts):
        yield texts[begin:]
