"""PagedModel: one Hugging Face causal LM whose keys and values live in one PagePool.

The model runs its own transformers code; only its attention is served from pages, through
transformers' AttentionInterface. A model is probed when it is taken on: once to learn the shape
of its keys and values, once to see that it computes from pages what it computes by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from w2s_fast.attention import AttentionPlan, choose_backend
from w2s_fast.body import PROBE_TOKENS, eager_logits, probe_ids, refuse, run_body
from w2s_fast.errors import InvalidRequest, PageMisuse
from w2s_fast.lm_head import LMHead
from w2s_fast.pages import Int32Array, Ints, PagePool, as_int32
from w2s_fast.probe import kv_shape
from w2s_fast.row_tree import RowTree

# Largest difference between paged and eager logits, as a share of the largest logit, that is
# still rounding: float32 sums differ by their order, half precision by its spacing.
_PROBE_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_PROBE_TOLERANCE_HALF = 0.1


class SharedTexts(NamedTuple):
    """Texts of a few sequences that have their first ``shared`` tokens, at least one, in common."""

    texts: list[list[int]]
    shared: int


class Replays(Protocol):
    """Passes that are recorded: see :class:`w2s_fast.pass_graphs.PassGraphs`."""

    def run(self, plan: object, tokens: Tensor) -> Tensor | None:
        """Last hidden states [T, D] of a planned pass over tokens [T]; None: not recorded."""
        ...


class PagedModel:
    """One model over one pool of pages.

    Attributes:
        name: what errors call it, for example ``"base"`` or ``"tuned guide"``.
        pool: its pages; slots are allocated, forked and released there.
        backend: what computes its attention; see :mod:`w2s_fast.attention`.
        vocab_size: width of its logits, padding included.
        hidden_size: width of its last hidden states.
        replays: recorded passes, which take the place of running the model's code; or None.
        max_positions: tokens a sequence can have; None if the model sets no limit. Less than
            the model's own where pages could not give the same beyond.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        name: str = "base",
        *,
        kv_cache_tokens: int = 65536,
        page_size: int = 16,
        max_slots: int = 1024,
        prefix_cache: bool = False,
        attention: str = "auto",
    ) -> None:
        """Take the model on, with room for ``kv_cache_tokens`` tokens in ``max_slots`` sequences.

        The model object is put into eval mode and otherwise left as it is: its attention is
        switched only while it runs here.

        Raises:
            UnsupportedModel: the model cannot be served from pages; says which, and why.
            InvalidRequest: ``kv_cache_tokens`` is too small for anything, or ``attention``
                cannot serve this model here.
        """
        nn.Module.eval(model)
        self.model = model
        self.name = name
        shape = kv_shape(model, name)
        self.max_positions = shape.max_positions
        least = 2 * -(-PROBE_TOKENS // page_size) * page_size
        if kv_cache_tokens < least:
            raise InvalidRequest(
                f"kv_cache_tokens is {kv_cache_tokens}; allowed: at least {least} "
                f"with pages of {page_size} tokens"
            )
        self.backend = choose_backend(
            attention,
            model.device,
            model=name,
            dtype=model.dtype,
            page_size=page_size,
            head_dim=shape.dim,
            sinks=shape.sinks,
        )
        self.head = LMHead(model, name)
        longest = min(self.max_positions or kv_cache_tokens, kv_cache_tokens)
        self.pool = PagePool(
            layers=shape.layers,
            num_kv_heads=shape.heads,
            head_dim=shape.dim,
            num_pages=-(-kv_cache_tokens // page_size),
            page_size=page_size,
            max_slots=max_slots,
            max_tokens_per_slot=longest,
            dtype=model.dtype,
            device=model.device,
            prefix_cache=prefix_cache,
        )
        self.replays: Replays | None = None
        self.vocab_size, self.hidden_size = self.compare_with_eager()

    @property
    def device(self) -> torch.device:
        return self.pool.device

    @torch.inference_mode()
    def forward(
        self, slots: Ints, tokens: Tensor, counts: Ints, tree: RowTree | None = None
    ) -> Tensor:
        """Append ``counts[i]`` tokens to ``slots[i]``, all in one pass.

        Args:
            slots: S slots of the pool, each once.
            tokens: int64 [T], the sequences' new tokens one after the other.
            counts: S numbers >= 1 that sum to T.
            tree: which of the slots share which of their first tokens; None: none do.

        Returns:
            Last hidden states [T, D], in the model's dtype.

        Raises:
            OutOfPages: nothing was appended.
        """
        self.pool.reserve(slots, counts)
        plan = self.backend.make(self.pool, slots, counts, tree)
        hidden = self.replays.run(plan, tokens) if self.replays is not None else None
        if hidden is None:
            hidden = run_body(self.model, tokens, plan.positions, plan)
        self.pool.extend(slots, counts)
        return hidden

    @torch.inference_mode()
    def recompute(self, groups: Sequence[SharedTexts]) -> list[Int32Array]:
        """New slots that hold given texts; what the texts of a group share is run once.

        Returns:
            For each group the slots of its texts.

        Raises:
            OutOfPages: there is no room; nothing has changed.
        """
        held: list[int] = []

        def run(slots: Sequence[int], chunks: Sequence[Sequence[int]]) -> None:
            rows = [i for i, chunk in enumerate(chunks) if chunk]
            tokens = [token for chunk in chunks for token in chunk]
            if rows:
                self.forward(
                    [slots[i] for i in rows],
                    torch.tensor(tokens, device=self.device),
                    [len(chunks[i]) for i in rows],
                )

        try:
            roots = self.pool.allocate(len(groups)).tolist()
            held += roots
            texts = [group.texts[0][: group.shared] for group in groups]
            cached = self.pool.adopt(roots, texts)
            run(roots, [text[found:] for text, found in zip(texts, cached)])
            others = self.pool.fork(roots, [len(group.texts) - 1 for group in groups]).tolist()
            held += others
            rest = iter(others)
            slots = [
                [root, *(next(rest) for _ in group.texts[1:])] for root, group in zip(roots, groups)
            ]
            run(
                [slot for own in slots for slot in own],
                [text[group.shared :] for group in groups for text in group.texts],
            )
        except BaseException:
            self.pool.release(held)
            raise
        return [np.array(own, np.int32) for own in slots]

    def decoding(self, slots: Ints, steps: int, tree: RowTree | None = None) -> Decoding:
        """Decode up to ``steps`` tokens, one in each of ``slots`` at a time.

        Raises:
            OutOfPages: there is no room for so many tokens; nothing has changed.
        """
        return Decoding(self, slots, steps, tree)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [N, D] -> logits [N, V], as the model defines them."""
        return self.head.logits(hidden)

    @torch.inference_mode()
    def token_logprobs(
        self, hidden: Tensor, tokens: Tensor, vocab_size: int | None = None
    ) -> Tensor:
        """log p(tokens[i] | hidden[i]), float32 [N]; ids from ``vocab_size`` on are padding."""
        return self.head.token_logprobs(hidden, tokens, vocab_size)

    def compare_with_eager(self) -> tuple[int, int]:
        """Two sequences side by side, in two passes, against the model's own eager forward.

        Returns:
            Widths of the logits and of the last hidden states.

        Raises:
            UnsupportedModel: they differ by more than rounding.
        """
        ids = probe_ids(self.model, 2 * PROBE_TOKENS)
        halves = (ids[:PROBE_TOKENS], ids[PROBE_TOKENS:].flip(0)[:-1])
        eager = [eager_logits(self.model, half, self.name) for half in halves]
        slots = self.pool.allocate(2)
        cut = [4, 2]
        passes = [
            self.forward(slots, torch.cat([h[:c] for h, c in zip(halves, cut)]), cut),
            self.forward(
                slots,
                torch.cat([h[c:] for h, c in zip(halves, cut)]),
                [len(h) - c for h, c in zip(halves, cut)],
            ),
        ]
        self.pool.release(slots)
        first, second = (self.logits(p) for p in passes)
        rest = len(halves[0]) - cut[0]
        paged = [
            torch.cat([first[: cut[0]], second[:rest]]),
            torch.cat([first[cut[0] :], second[rest:]]),
        ]
        tolerance = _PROBE_TOLERANCE.get(self.model.dtype, _PROBE_TOLERANCE_HALF)
        for ours, theirs in zip(paged, eager):
            room = tolerance * float(theirs.nan_to_num().abs().max()) + 1e-6
            if ours.shape != theirs.shape or not torch.allclose(
                ours.float(), theirs.float(), rtol=0.0, atol=room, equal_nan=True
            ):
                raise refuse(
                    self.model,
                    self.name,
                    "its logits from pages differ from its own eager forward",
                )
        return int(eager[0].shape[-1]), int(passes[0].shape[-1])


class Decoding:
    """Slots that grow together by a token at a time, under one plan.

    Room for all steps is reserved before the first one. Nothing else may be done with these slots
    until the last step is taken.
    """

    @torch.inference_mode()
    def __init__(
        self, model: PagedModel, slots: Ints, steps: int, tree: RowTree | None = None
    ) -> None:
        """See :meth:`PagedModel.decoding`."""
        self._model = model
        self._slots = as_int32(slots)
        self._one = np.ones(len(self._slots), np.int32)
        self._plan: AttentionPlan | None = None
        if steps > 0:
            model.pool.reserve(self._slots, self._one * steps)
            self._plan = model.backend.make(
                model.pool, self._slots, self._one, tree, ahead=steps - 1
            )
        self._left = steps
        self._begun = False

    @property
    def plan(self) -> AttentionPlan:
        """The plan of the pass that the last step made, or of the first one before any step."""
        if self._plan is None:
            raise PageMisuse("this decoding has no steps")
        return self._plan

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Append tokens int64 [S], one to each slot: last hidden states [S, D]."""
        self._need(1)
        plan = self.plan
        if self._begun:
            plan.advance()
        hidden = run_body(self._model.model, tokens, plan.positions, plan)
        self.count(1)
        return hidden

    def count(self, steps: int) -> None:
        """Count ``steps`` tokens a slot as written, by whoever ran the plan in our place."""
        self._need(steps)
        self._begun = True
        self._left -= steps
        self._model.pool.extend(self._slots, self._one * steps)

    def _need(self, steps: int) -> None:
        if steps > self._left:
            raise PageMisuse("there is no room for another step of this decoding")
