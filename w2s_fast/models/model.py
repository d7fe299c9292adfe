"""PagedModel: one Hugging Face causal LM whose keys and values live in one PagePool.

The model runs its own transformers code; only its attention is served from pages, through
transformers' AttentionInterface. A model is probed when it is taken on: once to learn the shape
of its keys and values, once to see that it computes from pages what it computes by itself.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from w2s_fast.attention import RowTree, brought, choose_backend
from w2s_fast.cache import NO_COPIES, Int32Array, Ints, PagePool
from w2s_fast.errors import InvalidRequest, UnsupportedModel, W2SFastError
from w2s_fast.kernels.linear_logprob_partials import Partials
from w2s_fast.models.adapters import Adapter
from w2s_fast.models.body import (
    PROBE_TOKENS,
    eager_logits,
    probe_ids,
    refuse,
    run_body,
    undisturbed,
    view_of,
)
from w2s_fast.models.changes import Change, Watch
from w2s_fast.models.inference import inference
from w2s_fast.models.lm_head import LMHead
from w2s_fast.models.memory import CPU_PASS_TOKENS
from w2s_fast.models.probe import kv_shape
from w2s_fast.models.ranks import Ranks
from w2s_fast.models.rounding import agree


class Replays(Protocol):
    """Passes that are recorded: see :class:`w2s_fast.decoding.PassGraphs`."""

    def run(
        self,
        slots: Ints,
        tokens: Tensor | Ints,
        counts: Ints,
        tree: RowTree | None,
        copies: Int32Array,
    ) -> Tensor | None:
        """What :meth:`PagedModel.forward` returns; None: it has to run without."""
        ...


class Recorded(Protocol):
    """What is recorded of a model's passes: see :mod:`w2s_fast.decoding.graphs`."""

    def missed(self, least: int) -> bool:
        """Whether some shape was missed ``least`` times."""
        ...

    def record_missed(self, least: int = 2) -> bool:
        """Record, between two steps, one shape that was missed ``least`` times; False: none."""
        ...

    def __len__(self) -> int:
        """How many shapes are recorded."""
        ...


class PagedModel:
    """One model over one pool of pages.

    Attributes:
        name: what errors call it, for example ``"base"`` or ``"tuned guide"``.
        model: the caller's model object; nothing of it is ever changed here.
        adapter: what is added to its weights in its passes; or None.
        ranks: among which it is divided; None: it is whole.
        view: what passes run: the same weights in eval mode, under paged attention.
        pool: its pages; slots are allocated, forked and released there.
        backend: what computes its attention; see :mod:`w2s_fast.attention`.
        vocab_size: width of its logits, padding included.
        hidden_size: width of its last hidden states.
        replays: recorded passes, which take the place of running the model's code; or None.
        recorded: all that is recorded of its passes.
        recordable: whether its passes can be recorded at all.
        moves: how often what a recorded pass has learnt of the model was no longer true.
        max_pass_tokens: the most tokens of a pass that reads prompts or given texts, or scores
            chunks; see :mod:`.passes`. A step of decoding has as many as it has rows.
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
        max_pass_tokens: int = CPU_PASS_TOKENS,
        adapter: Adapter | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """Take the model on, with room for ``kv_cache_tokens`` tokens in ``max_slots`` sequences.

        ``adapter``: read for this model object; it changes what passes compute here, and nothing of
        the model. Others over the same object compute without it. ``ranks``: among which it is
        divided; pages hold the keys and values of this one's heads.

        The model object is left as it is, and runs here in eval mode whatever it is set to. It
        shares its weights: after they were changed, see :meth:`follow`.

        Raises:
            UnsupportedModel: the model cannot be served from pages; says which, and why.
            InvalidRequest: ``kv_cache_tokens`` is too small for anything, or ``attention``
                cannot serve this model here.
        """
        self.model = model
        self.name = name
        self.adapter = adapter
        self.ranks = ranks
        self._watch = Watch(model)
        self._broken: UnsupportedModel | None = None
        self.moves = 0
        self.max_pass_tokens = max_pass_tokens
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
        self._view = view_of(model, name, adapter=adapter)
        self.view = self._view.model
        self.head = LMHead(self.view, name, None if adapter is None else adapter.head)
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
        self.recorded: list[Recorded] = []
        self.recordable = True
        self.vocab_size, self.hidden_size = self.compare_with_eager()

    @property
    def device(self) -> torch.device:
        return self.pool.device

    @inference
    def forward(
        self,
        slots: Ints,
        tokens: Tensor | Ints,
        counts: Ints,
        tree: RowTree | None = None,
        copies: Int32Array = NO_COPIES,
    ) -> Tensor:
        """Append ``counts[i]`` tokens to ``slots[i]``, all in one pass.

        Args:
            slots: S slots of the pool, each once.
            tokens: T, the sequences' new tokens one after the other. Numbers, or a tensor int64
                on the host, travel with the plan; one on a device is taken from there.
            counts: S numbers >= 1 that sum to T.
            tree: which of the slots share which of their first tokens; None: none do.
            copies: pages to be copied before, for these slots; see :meth:`PagePool.copy_pages`.

        Returns:
            Last hidden states [T, D], in the model's dtype.

        Raises:
            OutOfPages: nothing was appended.
            UnsupportedModel: the caller has made another model of it.
        """
        self.check()
        with undisturbed(self.device):
            self.pool.reserve(slots, counts)
            hidden = None
            if self.replays is not None:
                hidden = self.replays.run(slots, tokens, counts, tree, copies)
            if hidden is None:
                self.pool.copy_pages(copies)
                plan = self.backend.make(self.pool, slots, counts, tree)
                there = brought(torch.as_tensor(tokens, dtype=torch.int64), self.device)
                hidden = run_body(self.view, there, plan.positions, plan)
        self.pool.extend(slots, counts)
        return hidden

    def agree(self, tensor: Tensor) -> Tensor:
        """What decides on the ways of sequences: of several ranks all go on with rank 0's, in
        place. RankFailure."""
        return tensor if self.ranks is None else self.ranks.agree(tensor)

    def check(self) -> None:
        """UnsupportedModel: the caller has made another model of it."""
        if self._broken is not None:
            raise self._broken

    def forbid(self, ids: Collection[int]) -> None:
        """Give these ids no probability: neither sampled nor in any softmax. Before passes are
        recorded: what a recording does stays as it is."""
        forbidden = torch.zeros(self.vocab_size, dtype=torch.bool)
        forbidden[sorted(ids)] = True
        self.head.forbid(forbidden.to(self.device))

    @inference
    def logits(self, hidden: Tensor, own: bool = False) -> Tensor:
        """Hidden states [N, D] -> logits [N, V], as the model defines them; -inf where forbidden,
        unless its ``own`` are asked for."""
        with undisturbed(self.device):
            return self.head.logits(hidden, own)

    @inference
    def token_partials(
        self, hidden: Tensor, tokens: Tensor, vocab_size: int | None = None
    ) -> Partials:
        """log p(tokens[i] | hidden[i]), N of them; ids from ``vocab_size`` on are padding."""
        with undisturbed(self.device):
            return self.head.token_partials(hidden, tokens, vocab_size)

    def follow(self, announced: bool = False) -> bool:
        """Take note of what the caller has done to the model since; for between two passes.

        Where anything has changed, cached pages are dropped, and passes run with what is there
        now. What slots hold was computed before: it is the caller's to compute it again.

        Args:
            announced: weights were changed, even if nothing shows it.

        Returns:
            Whether anything has changed.
        """
        change = self._watch.change()
        if change is Change.NOTHING and not announced:
            return False
        if change is Change.KIND:
            why = "its modules, or the shape, dtype or device of its weights, are no longer those "
            why += "it was taken on with; make a new engine"
            self._broken = refuse(self.model, self.name, why)
        else:
            if change is Change.PLACES:
                self.moves += 1
                try:
                    self._view.follow()
                    self._broken = None
                except Exception as error:  # a caller may have put anything into a module
                    self._broken = refuse(self.model, self.name, f"it was changed: {error}")
            if self.adapter is not None:
                self.adapter.follow()
            self.head.follow()
        self.pool.drop_cache()
        self._watch.accept()
        return True

    def compare_with_eager(self) -> tuple[int, int]:
        """Two sequences side by side, in two passes, against the model's own eager forward.

        Returns:
            Widths of the logits and of the last hidden states.

        Raises:
            UnsupportedModel: they differ by more than rounding.
        """
        try:
            eager, paged, width = self._both_ways()
        except W2SFastError:
            raise
        except Exception as error:
            why = f"a probe of its passes failed: {error}"
            raise refuse(self.model, self.name, why) from error
        dtype = self.model.dtype
        if not all(agree(ours, theirs, dtype) for ours, theirs in zip(paged, eager)):
            why = "its logits from pages differ from its own eager forward"
            raise refuse(self.model, self.name, why)
        return int(eager[0].shape[-1]), width

    def _both_ways(self) -> tuple[list[Tensor], list[Tensor], int]:
        """Logits of two short texts, by eager forward and from pages; width of hidden states."""
        ids = probe_ids(self.model, 2 * PROBE_TOKENS)
        halves = (ids[:PROBE_TOKENS], ids[PROBE_TOKENS:].flip(0)[:-1])
        own = None if self.adapter is None else self.adapter.reference
        eager = eager_logits(self.model, halves, self.name, own)
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
        first, second = (self.logits(p, own=True) for p in passes)
        rest = len(halves[0]) - cut[0]
        paged = [
            torch.cat([first[: cut[0]], second[:rest]]),
            torch.cat([first[cut[0] :], second[rest:]]),
        ]
        return eager, paged, int(passes[0].shape[-1])
