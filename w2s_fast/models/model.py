"""PagedModel: one Hugging Face causal LM whose keys and values live in one PagePool.

The model runs its own transformers code; only its attention is served from pages, through
transformers' AttentionInterface. A model is probed when it is taken on: once to learn the shape
of its keys and values, once to see that it computes from pages what it computes by itself.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from w2s_fast.attention import RowTree, choose_backend
from w2s_fast.cache import Ints, PagePool
from w2s_fast.errors import InvalidRequest
from w2s_fast.models.body import (
    PROBE_TOKENS,
    eager_logits,
    probe_ids,
    refuse,
    run_body,
    switch_back,
)
from w2s_fast.models.lm_head import LMHead
from w2s_fast.models.probe import kv_shape

# Largest difference between paged and eager logits, as a share of the largest logit, that is
# still rounding: float32 sums differ by their order, half precision by its spacing.
_PROBE_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_PROBE_TOLERANCE_HALF = 0.1


class Replays(Protocol):
    """Passes that are recorded: see :class:`w2s_fast.decoding.PassGraphs`."""

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
        self._own_attention = model.config._attn_implementation
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

    def restore_attention(self) -> None:
        """The model object with the attention that it came with, after a pass that was cut off."""
        switch_back(self.model, self._own_attention)

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
