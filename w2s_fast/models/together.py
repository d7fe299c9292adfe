"""Together: models over the same weights, each with its adapter, run as one pass.

Their tokens stand one after the other; every product of the weights is computed once for all of
them, and each adapter adds to its own model's tokens. Attention stays apart: every model has its
own pages and its own plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from w2s_fast.attention import (
    ATTENTION_NAME,
    Attends,
    AttentionPlan,
    LayerOptions,
    RowTree,
    brought,
)
from w2s_fast.cache import NO_COPIES, Int32Array, Ints, as_int32
from w2s_fast.models.body import PROBE_TOKENS, probe_ids, refuse, run_body
from w2s_fast.models.deltas import Bounds, with_deltas
from w2s_fast.models.forwards import forward_of
from w2s_fast.models.inference import inference
from w2s_fast.models.model import PagedModel
from w2s_fast.models.passes import Part, forward_in_passes
from w2s_fast.models.probe import Probe
from w2s_fast.models.rounding import agree
from w2s_fast.models.view import ModelView

T = TypeVar("T")


class Together:
    """Several models over the same weights.

    Attributes:
        models: in the order in which their tokens stand.
        most_tokens: of one pass.
    """

    def __init__(self, models: Sequence[PagedModel]) -> None:
        """UnsupportedModel: together they do not compute what each computes alone."""
        self.models = list(models)
        self.most_tokens = min(model.max_pass_tokens for model in models)
        self._bounds = Bounds()
        self._view = ModelView(models[0].model, ATTENTION_NAME, self._forward_of)
        self._moves = models[0].moves
        self._compare()

    def run(self, tokens: Sequence[Tensor], plans: Sequence[AttentionPlan]) -> list[Tensor]:
        """The last hidden states [T, D] of each model's tokens int64 [T], under its plan."""
        return self._run(tokens, [plan.positions for plan in plans], plans)

    @inference
    def forward(
        self,
        slots: Sequence[Ints],
        tokens: Sequence[Tensor | Ints],
        counts: Sequence[Ints],
        trees: Sequence[RowTree | None],
        copies: Sequence[Int32Array],
    ) -> list[Tensor]:
        """:meth:`PagedModel.forward` of all models at once; arguments and results of each.

        Raises:
            OutOfPages: nothing was appended.
        """
        for model, own, new in zip(self.models, slots, counts):
            model.check()
            model.pool.reserve(own, new)
        for model, pairs in zip(self.models, copies):
            model.pool.copy_pages(pairs)
        plans = [
            model.backend.make(model.pool, own, new, tree)
            for model, own, new, tree in zip(self.models, slots, counts, trees)
        ]
        device = self.models[0].device
        there = [brought(torch.as_tensor(own, dtype=torch.int64), device) for own in tokens]
        hidden = self.run(there, plans)
        for model, own, new in zip(self.models, slots, counts):
            model.pool.extend(own, new)
        return hidden

    def _run(
        self, tokens: Sequence[Tensor], positions: Sequence[Tensor], plans: Sequence[Attends]
    ) -> list[Tensor]:
        if self._moves != self.models[0].moves:
            self._view.follow()
            self._moves = self.models[0].moves
        counts = [len(own) for own in tokens]
        self._bounds.of = list(accumulate(counts, initial=0))
        hidden = run_body(
            self._view.model,
            torch.cat(list(tokens)),
            torch.cat(list(positions)),
            _SideBySide(plans, self._bounds.of),
        )
        return list(torch.split(hidden, counts))

    def _forward_of(self, module: nn.Module) -> Callable[..., Any] | None:
        own = forward_of(module)
        deltas = [
            None if model.adapter is None else model.adapter.delta_of(module)
            for model in self.models
        ]
        if not any(deltas):
            return own
        return with_deltas(own or type(module).forward, deltas, self._bounds)

    def _compare(self) -> None:
        """Each model's short text, alone and in one pass."""
        first = self.models[0]
        ids = probe_ids(first.model, PROBE_TOKENS)
        places = torch.arange(len(ids), device=ids.device)
        texts = [ids.roll(m)[m % 2 :] for m in range(len(self.models))]
        positions = [places[: len(text)] for text in texts]
        try:
            alone = [
                run_body(model.view, text, own, Probe())
                for model, text, own in zip(self.models, texts, positions)
            ]
            found = self._run(texts, positions, [Probe() for _ in texts])
        except Exception as error:
            names = " and ".join(model.name for model in self.models)
            why = f"a probe of a pass that {names} share failed: {error}"
            raise refuse(first.model, first.name, why) from error
        if not all(agree(ours, theirs, first.model.dtype) for ours, theirs in zip(found, alone)):
            why = f"in a pass with {self.models[1].name} its states differ"
            raise refuse(first.model, first.name, why)


class _SideBySide:
    """The plans of several models as one: each attends for its own tokens."""

    def __init__(self, plans: Sequence[Attends], ends: Sequence[int]) -> None:
        self._plans = list(plans)
        self._spans = [slice(first, end) for first, end in pairwise(ends)]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: LayerOptions
    ) -> Tensor:
        return torch.cat(
            [
                plan.attend(layer, query[own], key[own], value[own], options)
                for plan, own in zip(self._plans, self._spans)
            ]
        )


class Groups:
    """Models, and which of them run as one pass: those over the same weights, if one is adapted.

    Attributes:
        models: all of them.
        members: of each group, as indices of ``models``.
        together: of each group; None: it is one model, which runs alone.
    """

    def __init__(self, models: Sequence[PagedModel]) -> None:
        """UnsupportedModel: models of a group cannot run as one pass."""
        self.models = list(models)
        self.members = _grouped(models)
        self.together = [
            Together([models[m] for m in own]) if len(own) > 1 else None for own in self.members
        ]

    def in_order(self, found: Sequence[Sequence[T]]) -> list[T]:
        """What was found for each group's models, in the order of all models."""
        at = {m: one for own, of in zip(self.members, found) for m, one in zip(own, of)}
        return [at[m] for m in range(len(self.models))]

    def forward(
        self,
        group: int,
        slots: Sequence[Ints],
        tokens: Sequence[Tensor | Ints],
        counts: Sequence[Ints],
        trees: Sequence[RowTree | None] | None = None,
        copies: Sequence[Int32Array] | None = None,
    ) -> Iterator[tuple[int, Part, Tensor]]:
        """:meth:`PagedModel.forward` of each model of a group, in passes of bounded size.

        All in one pass if it is not too large, else one model after the other.

        Args:
            slots, tokens, counts, trees, copies: of each model of the group.

        Yields:
            Which of the group's models; of which of its rows and tokens; their last hidden states
            [T, D], which nobody else keeps. The parts of a model come in their order.

        Raises:
            OutOfPages: of the models that follow nothing was appended.
        """
        members = self.members[group]
        trees = trees or [None] * len(members)
        copies = copies or [NO_COPIES] * len(members)
        together = self.together[group]
        sizes = [len(own) for own in tokens]
        if together is None or min(sizes) == 0 or sum(sizes) > together.most_tokens:
            for i, m in enumerate(members):
                own = (slots[i], tokens[i], counts[i], trees[i], copies[i])
                for part, hidden in forward_in_passes(self.models[m], *own) if sizes[i] else ():
                    yield i, part, hidden
            return
        for i, hidden in enumerate(together.forward(slots, tokens, counts, trees, copies)):
            part = Part(slice(0, len(slots[i])), slice(0, sizes[i]), as_int32(counts[i]))
            yield i, part, hidden


def _grouped(models: Sequence[PagedModel]) -> list[list[int]]:
    groups: list[list[int]] = []
    of: dict[int, list[int]] = {}
    adapted = {id(model.model) for model in models if model.adapter is not None}
    for m, model in enumerate(models):
        own = id(model.model)
        if own in of:
            of[own].append(m)
            continue
        groups.append([m])
        if own in adapted:
            of[own] = groups[-1]
    return groups
