"""PagedModel: one Hugging Face causal LM whose keys and values live in one PagePool.

The model runs its own transformers code; only its attention is served from pages, through
transformers' AttentionInterface. A model is probed when it is taken on: once to learn the shape
of its keys and values, once to see that it computes from pages what it computes by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from w2s_fast.attention import ATTENTION_NAME, Attends, AttentionPlan, choose_backend
from w2s_fast.errors import InvalidRequest, PageMisuse, UnsupportedModel
from w2s_fast.gathered_attention import LayerOptions, dense_attention
from w2s_fast.kernels.linear_logprob import linear_logprob
from w2s_fast.kernels.token_logprob import token_logprob
from w2s_fast.pages import Int32Array, Ints, PagePool, as_int32
from w2s_fast.row_tree import RowTree

_PROBE_TOKENS = 6
# Largest difference between paged and eager logits, as a share of the largest logit, that is
# still rounding: float32 sums differ by their order, half precision by its spacing.
_PROBE_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_PROBE_TOLERANCE_HALF = 0.1


class KVShape(NamedTuple):
    """Keys and values of one token: 2 * layers * heads * dim numbers.

    ``max_positions``: up to how many tokens pages give what the model would; None: no limit.
    ``sinks``: whether its attention layers have sinks, logits of no key.
    """

    layers: int
    heads: int
    dim: int
    max_positions: int | None
    sinks: bool


class SharedTexts(NamedTuple):
    """Texts of a few sequences that have their first ``shared`` tokens, at least one, in common."""

    texts: list[list[int]]
    shared: int


class PagedModel:
    """One model over one pool of pages.

    Attributes:
        name: what errors call it, for example ``"base"`` or ``"tuned guide"``.
        pool: its pages; slots are allocated, forked and released there.
        backend: what computes its attention; see :mod:`w2s_fast.attention`.
        vocab_size: width of its logits, padding included.
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
        least = 2 * -(-_PROBE_TOKENS // page_size) * page_size
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
        self.head = _Head(model, name)
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
        self.vocab_size = self._compare_with_eager()

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
        hidden = _run(self.model, tokens, plan.positions, plan)
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

    def _compare_with_eager(self) -> int:
        """Two sequences side by side, in two passes, against the model's own eager forward."""
        ids = _probe_ids(self.model, 2 * _PROBE_TOKENS)
        halves = (ids[:_PROBE_TOKENS], ids[_PROBE_TOKENS:].flip(0)[:-1])
        eager = [_eager_logits(self.model, half, self.name) for half in halves]
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
                raise _refuse(
                    self.model,
                    self.name,
                    "its logits from pages differ from its own eager forward",
                )
        return int(eager[0].shape[-1])


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

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Append tokens int64 [S], one to each slot: last hidden states [S, D]."""
        if self._plan is None or self._left == 0:
            raise PageMisuse("there is no room for another step of this decoding")
        if self._begun:
            self._plan.advance()
        self._begun = True
        self._left -= 1
        hidden = _run(self._model.model, tokens, self._plan.positions, self._plan)
        self._model.pool.extend(self._slots, self._one)
        return hidden


class _Head:
    """From last hidden states to logits: the model's LM head, and the scaling some models add."""

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        untyped: Any = model
        module = untyped.get_output_embeddings()
        if module is None:
            raise _refuse(model, name, "it has no LM head")
        config = model.config.get_text_config()
        self.module: nn.Module = module
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        # Cohere multiplies its logits, Granite divides them.
        self.scale = float(getattr(config, "logit_scale", None) or 1.0)
        self.scale /= float(getattr(config, "logits_scaling", None) or 1.0)

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.module(hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def token_logprobs(self, hidden: Tensor, tokens: Tensor, vocab_size: int | None) -> Tensor:
        if type(self.module) is nn.Linear:
            return linear_logprob(
                hidden,
                self.module.weight,
                tokens,
                self.module.bias,
                softcap=self.softcap,
                scale=self.scale,
                vocab_size=vocab_size,
            )
        # A quantised head computes its own product: a few rows at a time.
        blocks = [
            token_logprob(self.logits(h), t, vocab_size=vocab_size)
            for h, t in zip(torch.split(hidden, 64), torch.split(tokens, 64))
        ]
        return torch.cat(blocks) if blocks else hidden.new_zeros(0, dtype=torch.float32)


def kv_shape(model: PreTrainedModel, name: str = "base") -> KVShape:
    """Layers, heads and head size of the model's keys and values, seen in a run of a few tokens.

    Raises:
        UnsupportedModel: attention cannot be served from pages; says why.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise _refuse(model, name, "it is an encoder-decoder model")
    _check_attention_interface(model, name)
    probe = _Probe()
    ids = _probe_ids(model, _PROBE_TOKENS)
    try:
        _run(model, ids, torch.arange(len(ids), device=ids.device), probe)
    except UnsupportedModel:
        raise
    except Exception as error:
        raise _refuse(model, name, f"a probe of its attention failed: {error}") from error
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", len(probe.shapes))
    if not probe.shapes:
        raise _refuse(model, name, "its class does not call transformers' attention interface")
    if sorted(probe.shapes) != list(range(layers)) or probe.calls != layers:
        raise _refuse(
            model,
            name,
            f"{probe.calls} attention calls in {layers} layers: "
            "a layer that is not attention keeps state that pages do not hold",
        )
    if len(set(probe.shapes.values())) != 1:
        raise _refuse(model, name, "its layers have keys of different shapes")
    heads, dim = probe.shapes[0]
    limits = (
        getattr(model.config.get_text_config(), "max_position_embeddings", None),
        _window_limit(model, probe),
        _rope_limit(model),
    )
    known = [int(limit) for limit in limits if limit is not None]
    return KVShape(layers, heads, dim, min(known, default=None), probe.sinks)


def _window_limit(model: PreTrainedModel, probe: _Probe) -> int | None:
    """The window that some models apply in their mask only: within it there is nothing to mask."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * len(probe.windows)
    told = all(
        probe.windows[layer] is not None
        for layer, kind in enumerate(kinds)
        if kind == "sliding_attention"
    )
    return None if told else int(window)


def _rope_limit(model: PreTrainedModel) -> int | None:
    """Where rotary frequencies begin to follow the longest sequence of the whole pass.

    Longer ones would change their neighbours, and their own earlier tokens.
    """
    config = model.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [p for p in parameters.values() if isinstance(p, dict)]
    for rope in nested or [parameters]:
        if rope.get("rope_type") in ("longrope", "dynamic"):
            limit = rope.get("original_max_position_embeddings")
            limit = limit or getattr(config, "original_max_position_embeddings", None)
            return int(limit or config.max_position_embeddings)
    return None


class _Probe:
    """Stands in for a plan: attends within one short sequence and notes what it was given."""

    def __init__(self) -> None:
        self.shapes: dict[int, tuple[int, int]] = {}
        self.windows: dict[int, int | None] = {}
        self.sinks = False
        self.calls = 0

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: LayerOptions,
    ) -> Tensor:
        if key.shape != value.shape:
            raise ValueError(f"keys {tuple(key.shape)} and values {tuple(value.shape)} differ")
        self.calls += 1
        self.shapes[layer] = (key.shape[1], key.shape[2])
        self.windows[layer] = options.window
        self.sinks |= options.sinks is not None
        causal = torch.ones(len(query), len(query), dtype=torch.bool, device=query.device).tril()
        return dense_attention(query[None], key[None], value[None], causal[None], options)[0]


def _check_attention_interface(model: PreTrainedModel, name: str) -> None:
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION_NAME)  # only warns where the class does not allow it
    switched = model.config._attn_implementation == ATTENTION_NAME
    model.config._attn_implementation = before
    if not switched:
        raise _refuse(model, name, "its class does not use transformers' attention interface")


def _run(model: PreTrainedModel, tokens: Tensor, positions: Tensor, plan: Attends) -> Tensor:
    """The model's body over one row of tokens: last hidden states [T, D]."""
    with _attention_switched(model, ATTENTION_NAME), torch.inference_mode():
        out = model.base_model(
            input_ids=tokens[None],
            position_ids=positions[None],
            use_cache=False,
            past_key_values=None,
            w2s_plan=plan,
        )
    hidden: Tensor = out.last_hidden_state
    return hidden[0]


def _eager_logits(model: PreTrainedModel, tokens: Tensor, name: str) -> Tensor:
    try:
        with _attention_switched(model, "eager"), torch.inference_mode():
            logits: Tensor = model(input_ids=tokens[None], use_cache=False).logits
    except Exception as error:
        raise _refuse(model, name, f"its own forward failed: {error}") from error
    return logits[0]


@contextmanager
def _attention_switched(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """The model with another attention, and afterwards as it was.

    A caller's model object stays usable by itself: ``model.generate`` after a search runs the
    attention it was loaded with. Assigning to the config is what ``set_attn_implementation``
    does in the end, once it has checked that the class allows it.
    """
    config: Any = model.config
    before = config._attn_implementation
    if before != implementation:
        config._attn_implementation = implementation
    try:
        yield
    finally:
        if before != implementation:
            config._attn_implementation = before


def _probe_ids(model: PreTrainedModel, count: int) -> Tensor:
    size = int(model.config.get_text_config().vocab_size)
    return torch.arange(1, count + 1, device=model.device) * 7 % size


def _refuse(model: PreTrainedModel, name: str, why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{name}: {type(model).__name__} ({model.config.model_type}) cannot be served: {why}"
    )
