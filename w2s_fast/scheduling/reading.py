"""What a model says of every token of given texts, between two steps of the running requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from w2s_fast.errors import InvalidRequest, NumericalError
from w2s_fast.models import PagedModel, forward_in_passes
from w2s_fast.result import TokenLogProbs
from w2s_fast.scheduling.orders import Work
from w2s_fast.scheduling.runner import Runner
from w2s_fast.scheduling.scheduler import Room

READ = "read"  # the work of :func:`read_one`: a model, by its name, and the rest
# Rows of logits at a time: each is as wide as the vocabulary, and in float32.
_ROWS = 64


def check_readable(model: PagedModel, text: Sequence[int]) -> None:
    """Whether the text could be read if nothing else ran; it has at least one token.

    Raises:
        InvalidRequest: names the model, what is needed and what there is.
    """
    pool = model.pool
    if model.max_positions is not None and len(text) > model.max_positions:
        raise InvalidRequest(
            f"a text has {len(text)} tokens for {model.name}; allowed: {model.max_positions}"
        )
    if _pages(text, pool.page_size) > pool.num_pages:
        raise InvalidRequest(
            f"a text has {len(text)} tokens for {model.name}, whose KV cache has room for "
            f"{pool.num_pages * pool.page_size}; allowed: a shorter text, or a larger "
            "kv_cache_tokens"
        )


def read_given(
    runner: Runner, model: PagedModel, texts: Sequence[Sequence[int]], top: int, vocab_size: int
) -> Iterator[TokenLogProbs]:
    """What the model says of each text, one after the other; :func:`check_readable` has passed it.

    A text runs from its first token on, for the prefix cache keeps keys and values and no logits.
    Other requests take their steps between two texts.

    Args:
        top: how many of the likeliest tokens to tell of each place.
        vocab_size: ids from here on are padding.

    Raises:
        NumericalError: the model gave NaN or infinity.
    """
    for text in texts:
        yield read_one(runner, model, text, top, vocab_size)


def read_one(
    runner: Runner, model: PagedModel, text: Sequence[int], top: int, vocab_size: int
) -> TokenLogProbs:
    """The same of one text."""
    rooms = [Room(model.pool, _pages(text, model.pool.page_size), 1)]
    # The last token is not run: nothing is asked of what would follow.
    with runner.turn_with(rooms, Work(READ, (model.name, list(text), top, vocab_size))):
        slots = model.pool.allocate(1)
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        if len(text) > 1:
            for part, hidden in forward_in_passes(model, slots, text[:-1], [len(text) - 1]):
                targets = text[1 + part.tokens.start : 1 + part.tokens.stop]
                found += _of_rows(model, hidden, targets, top, vocab_size)
        model.pool.release(slots)
    return _joined(model, text, found)


def _pages(text: Sequence[int], page_size: int) -> int:
    return -(-(len(text) - 1) // page_size)


def _of_rows(
    model: PagedModel, hidden: Tensor, targets: Sequence[int], top: int, vocab_size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """On the host: log-probs [N] of targets; ids [N, top] of the likeliest, and their log-probs."""
    ids = torch.tensor(targets, device=hidden.device)
    for own, wanted in zip(torch.split(hidden, _ROWS), torch.split(ids, _ROWS)):
        logprobs = model.logits(own)[:, :vocab_size].float().log_softmax(-1)
        # Both from the same numbers: the likeliest token has the first one's value to the last bit.
        values, likeliest = logprobs.topk(min(top, vocab_size), -1)
        yield logprobs.gather(1, wanted[:, None])[:, 0].cpu(), likeliest.cpu(), values.cpu()


def _joined(
    model: PagedModel, text: Sequence[int], found: Sequence[tuple[Tensor, Tensor, Tensor]]
) -> TokenLogProbs:
    logprobs: list[float] = []
    tops: list[dict[int, float]] = []
    for own, ids, values in found:
        if not own.isfinite().all():
            # Where is not told: within a pass attention may carry NaN to the tokens before it, too.
            raise NumericalError(
                f"model {model.name!r} gave NaN or infinity in a text of {len(text)} tokens"
            )
        logprobs += own.tolist()
        tops += [dict(zip(*pair)) for pair in zip(ids.tolist(), values.tolist())]
    return TokenLogProbs(list(text), [None, *logprobs], [None, *tops])
