"""Guides: a pair of small models whose log-probability difference says what is better.

:class:`Guide` is what a caller writes; :class:`PagedGuide` is what runs. Each of its two models
keeps its KV one token behind the text: the log-prob of a chunk's first token needs the hidden
state of the token before it, so a chunk of L tokens costs exactly L forwarded tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from w2s_fast.attention import RowTree
from w2s_fast.cache import NO_COPIES, Int32Array, Ints
from w2s_fast.decoding import Lane
from w2s_fast.kernels.linear_logprob_partials import Partials
from w2s_fast.models import ModelSource, PagedModel, forward_in_passes
from w2s_fast.search.beginnings import prefill


@dataclass(frozen=True)
class Guide:
    """A tuned small model and its untuned starting point (path, hub id or loaded model).

    Args:
        tuned: the model that prefers what is wanted.
        untuned: the model it was tuned from; same vocabulary.
        weight: factor of its score; guides' scores are added.
        prompt_template: text around every plain prompt of this guide, ``{prompt}`` in it: one for
            both models, or a pair (for tuned, for untuned), in which None is no template. Chat
            messages go through each model's own chat template: that of the tokenizer that lies
            with it, else the base's.
    """

    tuned: ModelSource
    untuned: ModelSource
    weight: float = 1.0
    prompt_template: str | tuple[str | None, str | None] | None = None


class TokenLogprobs(NamedTuple):
    """Log-probs of the same T tokens under both models of a guide, float32 [T] each."""

    tuned: Tensor
    untuned: Tensor


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


class PagedGuide:
    """A guide at work: its two models, each over its own pages.

    Sequences are named by slots of shape int32 [2, S]: row 0 in the tuned model's pool, row 1 in
    the untuned one's.
    """

    def __init__(
        self, tuned: PagedModel, untuned: PagedModel, weight: float, vocab_size: int
    ) -> None:
        """``vocab_size``: ids from here on are padding, outside of both softmaxes."""
        self.models = (tuned, untuned)
        self.weight = weight
        self.vocab_size = vocab_size
        # A chunk is too little work to fill a GPU, so both models run at once.
        self._lane = Lane(tuned.device)

    def prefill(self, prompts: Sequence[Sequence[Sequence[int]]]) -> Int32Array:
        """New slots int32 [2, S] that hold all but the last token of each prompt (>= 1 token).

        ``prompts``: S for the tuned model, and S for the untuned one.

        What the prefix cache has of a prompt is not run again, and with a prefix cache, what
        several of a model's prompts begin with is run once.
        """
        tuned, untuned = self.models
        texts = [[prompt[:-1] for prompt in own] for own in prompts]
        first = prefill(tuned, texts[0])
        try:
            return np.stack([first, prefill(untuned, texts[1])])
        except BaseException:
            tuned.pool.release(first)
            raise

    def append(
        self, slots: Int32Array, before: Sequence[Sequence[int]], chunks: Sequence[Sequence[int]]
    ) -> TokenLogprobs:
        """Score new tokens, and append all but the last of each chunk to the KV.

        Args:
            slots: int32 [2, S].
            before: for each model S tokens, each the last one before its chunk (not in the KV yet).
            chunks: S chunks of at least one token, the same for both models.

        Returns:
            The log-probs of the chunks' tokens, one chunk after the other.
        """
        device = self.models[0].device
        targets = torch.tensor([token for chunk in chunks for token in chunk], device=device)
        inputs = [
            torch.tensor([t for last, chunk in zip(own, chunks) for t in (last, *chunk[:-1])])
            for own in before
        ]
        rows = [ChunkRows(own, tokens) for own, tokens in zip(slots, inputs)]
        partials = self.score(targets, [len(chunk) for chunk in chunks], rows)
        return TokenLogprobs(*(own.logprobs() for own in partials))

    def score(self, targets: Tensor, counts: Ints, rows: Sequence[ChunkRows]) -> GuidePartials:
        """The same for chunks that are laid out; what is left of their log-probs.

        Args:
            targets: int64 [T], the tokens of S chunks. counts: S, how many each has, at least one.
            rows: for each model.
        """

        def run(m: int) -> Partials:
            model, (slots, inputs, tree, copies) = self.models[m], rows[m]
            found = [
                model.token_partials(hidden, targets[part.tokens], self.vocab_size)
                for part, hidden in forward_in_passes(model, slots, inputs, counts, tree, copies)
            ]
            if len(found) == 1:
                return found[0]
            # Merged, for they are of as many splits as their passes have chosen.
            return Partials.of_logprobs(torch.cat([own.logprobs() for own in found]))

        return self.both(run)

    def both(self, run: Callable[[int], Partials]) -> GuidePartials:
        """What ``run`` finds for the tuned model, 0, and the untuned one, 1: side by side."""
        try:
            with self._lane.beside():
                tuned = run(0)
            untuned = run(1)
        finally:
            self._lane.join()
        return tuned, untuned

    def release(self, slots: Int32Array) -> None:
        """Give slots int32 [2, S] back."""
        for model, own in zip(self.models, slots):
            model.pool.release(own)

    def join(self) -> None:
        """What runs from now on comes after all that was launched, also where that was cut off."""
        self._lane.join()
