"""What an adapter makes of one module: a low-rank product beside its own, or another module.

A module is run once for the tokens of one model, or for those of several over the same weights,
one after the other: see :mod:`.together`. Its own product is computed once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn


@dataclass
class LowRank:
    """LoRA beside a linear module (arXiv 2106.09685), or DoRA (arXiv 2402.09353).

    Attributes:
        down: [R, D]. up: [V, R]. scale: of their product. Their dtype may be another one than that
            of what goes through the module.
        bias: [V] that is added to it before it is scaled; or None.
        magnitude: DoRA's norms of the rows of the weight, [V]; None: plain LoRA.
        factor: by which DoRA multiplies all but the module's own bias, [V]: see :meth:`follow`.
        module: whose product it stands beside.
        weight: its weight as numbers [V, D]; of DoRA.
    """

    down: Tensor
    up: Tensor
    scale: float
    bias: Tensor | None
    magnitude: Tensor | None
    module: nn.Module
    weight: Callable[[], Tensor]
    factor: Tensor | None = None

    def __post_init__(self) -> None:
        if self.magnitude is not None:
            self.factor = torch.empty_like(self.magnitude)
            self.follow()

    @torch.no_grad()
    def follow(self) -> None:
        """The module's weight may have other values now. What is read stays where it is."""
        if self.magnitude is not None and self.factor is not None:
            norms = (self.weight() + self.scale * (self.up @ self.down)).norm(dim=1)
            self.factor.copy_(self.magnitude / norms)

    def add_to(self, out: Tensor, inputs: Tensor) -> None:
        """Add to the module's own result [T, V] of ``inputs`` [T, D], in place."""
        own = getattr(self.module, "bias", None) if self.factor is not None else None
        if own is not None:
            out.sub_(own)
        if self.down.dtype is inputs.dtype is out.dtype:
            out.addmm_(nn.functional.linear(inputs, self.down), self.up.T, alpha=self.scale)
        else:  # beside packed weights
            low = nn.functional.linear(inputs.to(self.down.dtype), self.down)
            out.add_((self.scale * low @ self.up.T).to(out.dtype))
        if self.bias is not None:
            out.add_(self.bias, alpha=self.scale)
        if self.factor is not None:
            out.mul_(self.factor)
        if own is not None:
            out.add_(own)


@dataclass
class Replaced:
    """A module that runs in the place of another one."""

    module: nn.Module


Delta: TypeAlias = LowRank | Replaced


class Bounds:
    """Where the tokens of each model begin in a pass of several, and where the last ones end.

    ``of``: one more than there are models; None: all tokens are of one model.
    """

    of: list[int] | None = None


def with_deltas(
    own: Callable[[Any, Tensor], Tensor], deltas: Sequence[Delta | None], bounds: Bounds
) -> Callable[[Any, Tensor], Tensor]:
    """The forward of a module with what the adapters of several models make of it.

    Args:
        own: its forward without any. deltas: of each model, in the order of their tokens.
    """

    def forward(module: Any, inputs: Tensor) -> Tensor:
        if bounds.of is None:
            (delta,) = deltas
            return _part(own, module, delta, inputs)
        ends, axis = bounds.of, _axis(inputs)
        if inputs.shape[axis] != ends[-1]:
            raise ValueError(f"its {type(module).__name__} does not see all tokens of a pass")
        if any(isinstance(delta, Replaced) for delta in deltas):
            parts = torch.split(inputs, [end - first for first, end in pairwise(ends)], axis)
            found = [_part(own, module, delta, part) for delta, part in zip(deltas, parts)]
            return torch.cat(found, axis)
        out = own(module, inputs)
        for delta, (first, end) in zip(deltas, pairwise(ends)):
            if delta is not None:
                count = end - first
                _add(delta, out.narrow(axis, first, count), inputs.narrow(axis, first, count))
        return out

    return forward


def _part(
    own: Callable[[Any, Tensor], Tensor], module: Any, delta: Delta | None, inputs: Tensor
) -> Tensor:
    """The result of one model's tokens."""
    if isinstance(delta, Replaced):
        out: Tensor = delta.module(inputs)
        return out
    out = own(module, inputs)
    if delta is not None:
        _add(delta, out, inputs)
    return out


def _add(delta: Delta, out: Tensor, inputs: Tensor) -> None:
    assert isinstance(delta, LowRank)
    # Views: of one row of tokens, all axes but the last lie as one does.
    delta.add_to(out.view(-1, out.shape[-1]), inputs.reshape(-1, inputs.shape[-1]))


def _axis(inputs: Tensor) -> int:
    """Which axis of [1, T], [1, T, ...], [T] or [T, D] the tokens are; several tokens."""
    return 1 if inputs.dim() > 1 and len(inputs) == 1 else 0
