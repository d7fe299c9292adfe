"""Guides: a pair of small models whose log-probability difference says what is better.

:class:`Guide` is what a caller writes; :class:`PagedGuide` is what runs. Each of its models
keeps its KV one token behind the text: the log-prob of a chunk's first token needs the hidden
state of the token before it, so a chunk of L tokens costs exactly L forwarded tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from w2s_fast.attention import RowTree, brought
from w2s_fast.cache import NO_COPIES, Int32Array, Ints
from w2s_fast.decoding import Lane
from w2s_fast.kernels.linear_logprob_partials import Partials
from w2s_fast.models import Groups, ModelSource, PagedModel
from w2s_fast.search.beginnings import prefill


@dataclass(frozen=True)
class Guide:
    """A tuned small model and its untuned starting point (path, hub id or loaded model).

    A model that is named more than once, the base included, is loaded once on each device. Where it
    has the same prompts in all of its roles there, it also runs once.

    Args:
        tuned: the model that prefers what is wanted. The base, with a smaller one as untuned, is
            contrastive decoding (arXiv 2210.15097).
        untuned: the model it was tuned from; of the same vocabulary. None: the tuned one's
            log-probs alone are the score, as of a reward model that speaks per token (GenARM,
            arXiv 2410.08193).
        weight: factor of its score; guides' scores are added.
        prompt_template: text around every plain prompt of this guide, ``{prompt}`` in it: one for
            both models, or a pair (for tuned, for untuned), in which None is no template. Chat
            messages go through each model's own chat template: that of the tokenizer that lies
            with it, else the base's.
        tokenizer: of both models, where it does not lie with them.
        device: where both models lie: anything torch accepts, or ``"auto"``; None: the engine's.
            On another one the base, named here, is a model more. See docs/parallel.md.
    """

    tuned: ModelSource
    untuned: ModelSource | None
    weight: float = 1.0
    prompt_template: str | tuple[str | None, str | None] | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    device: str | torch.device | None = None


class ChunkRows(NamedTuple):
    """Chunks as one model runs them.

    Attributes:
        slots: int32 [S]. inputs: int64 [T], for each chunk the token before it, and its own but
            the last. tree: which slots share which of their first tokens; None: none do.
        copies: pages that are copied before; see PagePool.copy_pages.
    """

    slots: Int32Array
    inputs: Tensor
    tree: RowTree | None = None
    copies: Int32Array = NO_COPIES


# What the tuned and the untuned model leave of their log-probs.
GuidePartials: TypeAlias = tuple[Partials, Partials]

T = TypeVar("T")


class PagedGuide:
    """A guide at work: its models, each over pages that others may use, too.

    Sequences are named by slots of shape int32 [M, S]: row 0 in the tuned model's pool, row 1 in
    the untuned one's, if there is one.

    Attributes:
        models: the tuned, and the untuned one.
    """

    def __init__(
        self, tuned: PagedModel, untuned: PagedModel | None, weight: float, vocab_size: int
    ) -> None:
        """``vocab_size``: ids from here on are padding, outside of both softmaxes."""
        self.models = (tuned,) if untuned is None else (tuned, untuned)
        self.weight = weight
        self.vocab_size = vocab_size
        self._groups = Groups(self.models)
        self._lane = Lane(tuned.device)

    def prefill(self, prompts: Sequence[Sequence[Sequence[int]]]) -> Int32Array:
        """New slots int32 [M, S] that hold all but the last token of each prompt (>= 1 token).

        ``prompts``: S for each model.

        What the prefix cache has of a prompt is not run again, and with a prefix cache, what
        several of a model's prompts begin with is run once.
        """
        slots: list[Int32Array] = []
        try:
            for model, own in zip(self.models, prompts):
                slots.append(prefill(model, [prompt[:-1] for prompt in own]))
        except BaseException:
            for model, held in zip(self.models, slots):
                model.pool.release(held)
            raise
        return np.stack(slots)

    def append(
        self, slots: Int32Array, before: Sequence[Sequence[int]], chunks: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """Score new tokens, and append all but the last of each chunk to the KV.

        Args:
            slots: int32 [M, S].
            before: for each model S tokens, each the last one before its chunk (not in the KV yet).
            chunks: S chunks of at least one token, the same for all models.

        Returns:
            For each model the log-probs of the chunks' tokens, one chunk after the other.
        """
        device = self.models[0].device
        targets = torch.tensor([token for chunk in chunks for token in chunk], device=device)
        inputs = [
            torch.tensor([t for last, chunk in zip(own, chunks) for t in (last, *chunk[:-1])])
            for own in before
        ]
        rows = [ChunkRows(own, tokens) for own, tokens in zip(slots, inputs)]
        counts = [len(chunk) for chunk in chunks]
        partials = score_chunks(self._groups, self._lane, targets, counts, rows, self.vocab_size)
        return [own.logprobs() for own in partials]

    def release(self, slots: Int32Array) -> None:
        """Give slots int32 [M, S] back."""
        for model, own in zip(self.models, slots):
            model.pool.release(own)

    def join(self) -> None:
        """What runs from now on comes after all that was launched, also where that was cut off."""
        self._lane.join()


def score_chunks(
    groups: Groups,
    lane: Lane,
    targets: Tensor,
    counts: Ints,
    rows: Sequence[ChunkRows],
    vocab_size: int,
) -> list[Partials]:
    """What each model leaves of the log-probs of chunks; all but their last tokens are appended.

    Args:
        targets: int64 [T], the tokens of S chunks. counts: S, how many each has, at least one.
        groups: of the models. rows: for each of them. vocab_size: ids from here on are padding.

    Returns:
        Of each model, where ``targets`` are: from other devices finished log-probs are brought.
    """
    if len(counts) == 0:  # all texts have ended before their first new token
        nothing = Partials.of_logprobs(torch.zeros(0, device=targets.device))
        return [nothing] * len(groups.models)

    def run(g: int) -> list[Partials]:
        models = [groups.models[m] for m in groups.members[g]]
        own = [rows[m] for m in groups.members[g]]
        there = brought(targets, models[0].device)
        found: list[list[Partials]] = [[] for _ in models]
        for i, part, hidden in groups.forward(
            g,
            [one.slots for one in own],
            [one.inputs for one in own],
            [counts] * len(own),
            [one.tree for one in own],
            [one.copies for one in own],
        ):
            partials = models[i].token_partials(hidden, there[part.tokens], vocab_size)
            found[i].append(partials)
        return [_joined(parts) for parts in found]

    found = groups.in_order(two_at_a_time(lane, len(groups.members), run))
    here = targets.device
    return [own if own.target.device == here else _brought(own, here) for own in found]


def _brought(partials: Partials, device: torch.device) -> Partials:
    """On another device: merged, for that is a number a token, and not one for each split."""
    return Partials.of_logprobs(brought(partials.logprobs(), device))


def _joined(parts: Sequence[Partials]) -> Partials:
    """Those of passes one after the other."""
    if len(parts) == 1:
        return parts[0]
    # Merged, for they are of as many splits as their passes have chosen.
    return Partials.of_logprobs(torch.cat([own.logprobs() for own in parts]))


def two_at_a_time(lane: Lane, count: int, run: Callable[[int], T]) -> list[T]:
    """What ``run`` finds for 0, 1, ... ``count`` - 1, each second one beside the one before it.

    A chunk is too little work for one model to fill a GPU.
    """
    found: list[T] = []
    for first in range(0, count, 2):
        try:
            with lane.beside():
                found.append(run(first))
            if first + 1 < count:
                found.append(run(first + 1))
        finally:
            lane.join()
    return found


class Roles(NamedTuple):
    """Which of a search's models a guide's are: 0 is the base; None: it has none."""

    tuned: int
    untuned: int | None


def roles_of(guides: Sequence[PagedGuide], models: Sequence[PagedModel]) -> list[Roles]:
    """Of each guide; ``models``: of :func:`distinct_models`."""
    at = {model: role for role, model in enumerate(models)}
    found = ([at[model] for model in guide.models] for guide in guides)
    return [Roles(own[0], own[1] if len(own) > 1 else None) for own in found]


def partials_of(
    roles: Sequence[Roles], partials: Sequence[Partials], logprobs: Tensor
) -> list[GuidePartials]:
    """Those of each guide.

    Args:
        partials: of all models but the base. logprobs: float32 [T], the base's of the same tokens.
    """

    def at(role: int | None) -> Partials:
        if role is None:
            return Partials.of_logprobs(torch.zeros_like(logprobs))
        return Partials.of_logprobs(logprobs) if role == 0 else partials[role - 1]

    return [(at(tuned), at(untuned)) for tuned, untuned in roles]


def distinct_models(base: PagedModel, guides: Sequence[PagedGuide]) -> list[PagedModel]:
    """The base, and behind it the guides' other models, each once."""
    models = [base, *(model for guide in guides for model in guide.models)]
    return list(dict.fromkeys(models))
