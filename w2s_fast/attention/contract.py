"""The contract of an attention backend: what plans forward passes over pages, and what a plan does.

A forward pass runs all its sequences as one row of T tokens. Before it, a :class:`Backend` makes a
plan on the host: where each token's keys and values are written, and which keys each token may
see. During it, every attention layer hands its tensors to :meth:`Attends.attend`. One plan serves a
whole chunk of decoding: between the steps it moves on by a token a row, in place and on the device.

Backends: :mod:`kernel` (``"triton"``), :mod:`flash` (``"flash"``), :mod:`gathered` (``"torch"``).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from w2s_fast.attention.row_tree import RowTree
from w2s_fast.cache import Ints, PagePool


class LayerOptions(NamedTuple):
    """What an attention layer asks for beside its tensors.

    Attributes:
        scale: factor on query . key.
        window: how many keys a query sees, its own included; None: all before it.
        softcap: of the scaled logits; None is off.
        sinks: [H], one more logit for each head; None: none.
    """

    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None


class Attends(Protocol):
    """What the attention function needs of the ``w2s_plan`` it is given."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: LayerOptions,
    ) -> Tensor:
        """query [T, H, D], key and value [T, Hkv, D] -> [T, H, D]."""
        ...


class AttentionPlan(Attends, Protocol):
    """A plan of passes over one pool.

    Attributes:
        positions: int64 [T], each token's position in its sequence, on the pool's device.
    """

    positions: Tensor

    def advance(self) -> None:
        """Move on to the next pass, of one token a row again.

        Only where every row has one token and the plan was made for passes ahead. No data on the
        device is read by the host, and ``positions`` keeps its address.
        """
        ...


class Backend(Protocol):
    """One way to compute attention over pages."""

    def make(
        self,
        pool: PagePool,
        slots: Ints,
        counts: Ints,
        tree: RowTree | None = None,
        ahead: int = 0,
    ) -> AttentionPlan:
        """Plan ``counts[i]`` new tokens for ``slots[i]``: after ``reserve``, before ``extend``.

        Args:
            tree: which rows share which keys; None: none do.
            ahead: how many passes of one token a row follow on this one, each after
                :meth:`AttentionPlan.advance`. Their room has been reserved, too.
        """
        ...
