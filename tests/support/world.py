"""Rows of a search in a real page pool, and what attention over them has to give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from w2s_fast.attention.contract import LayerOptions
from w2s_fast.attention.gathered import GatheredPlan
from w2s_fast.attention.row_tree import Level, RowTree
from w2s_fast.cache.pages import PagePool

KV_HEADS, DIM = 2, 8
LAYER = 1
PLAIN = LayerOptions(DIM**-0.5, None, None, None)


def reference(
    query: Tensor, keys: Tensor, values: Tensor, position: int, options: LayerOptions
) -> Tensor:
    """One token [H, D] over all keys [n, Hkv, D] of its sequence, in float64."""
    query, keys, values = query.double(), keys.double(), values.double()
    first = 0 if options.window is None else max(0, position - options.window + 1)
    out = torch.empty_like(query)
    groups = len(query) // keys.shape[1]
    for h in range(len(query)):
        logits = keys[first : position + 1, h // groups] @ query[h] * options.scale
        if options.softcap is not None:
            logits = torch.tanh(logits / options.softcap) * options.softcap
        if options.sinks is not None:
            logits = torch.cat([logits, options.sinks[h : h + 1].double()])
        weights = logits.softmax(0)[: position + 1 - first]
        out[h] = weights @ values[first : position + 1, h // groups]
    return out


class World:
    """A pool and, beside it, what every slot should hold: keys and values [n, 2, Hkv, D]."""

    def __init__(self, page_size: int, dtype: torch.dtype, seed: int) -> None:
        self.pool = PagePool(2, KV_HEADS, DIM, 3000 // page_size, page_size, 100, 600, dtype, "cpu")
        self.pool.kv.fill_(torch.nan)
        self.held: dict[int, Tensor] = {}
        self.generator = torch.Generator().manual_seed(seed)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.pool.kv.dtype)

    def new(self, length: int) -> int:
        slot = int(self.pool.allocate(1)[0])
        self.held[slot] = self.randn(0, 2, KV_HEADS, DIM)
        self.grow(slot, length)
        return slot

    def grow(self, slot: int, length: int) -> None:
        """Append random tokens."""
        if not length:
            return
        self.pool.reserve([slot], [length])
        where = self.pool.places([slot], [length])
        kv = self.randn(length, 2, KV_HEADS, DIM)
        self.pool.kv[LAYER].flatten(1, 2)[:, where] = kv.transpose(0, 1)
        self.pool.extend([slot], [length])
        self.held[slot] = torch.cat([self.held[slot], kv])

    def fork(self, slot: int, children: int) -> list[int]:
        """The slot and ``children - 1`` copies."""
        forked = self.pool.fork([slot], [children - 1]).tolist()
        self.held.update(dict.fromkeys(forked, self.held[slot]))
        return [slot, *forked]

    def release(self, slot: int) -> None:
        self.pool.release([slot])
        del self.held[slot]

    def run(
        self,
        plan: GatheredPlan,
        slots: Sequence[int],
        counts: Sequence[int],
        options: LayerOptions,
        heads: int,
    ) -> tuple[Tensor, Tensor]:
        """One pass of a plan: its result and the reference's, [T, H, D]."""
        total = sum(counts)
        query, kv = self.randn(total, heads, DIM), self.randn(total, 2, KV_HEADS, DIM)
        out = plan.attend(LAYER, query, kv[:, 0], kv[:, 1], options)
        self.pool.extend(slots, counts)
        expected, token = [], 0
        for slot, count in zip(slots, counts, strict=True):
            old = len(self.held[slot])
            self.held[slot] = torch.cat([self.held[slot], kv[token : token + count]])
            keys, values = self.held[slot].unbind(1)
            for i in range(old, old + count):
                assert plan.positions[token] == i
                expected.append(reference(query[token], keys, values, i, options))
                token += 1
        return out, torch.stack(expected)


@dataclass
class Rows:
    """Slots in the order of a pass, and their tree."""

    slots: list[int]
    tree: RowTree

    def only(self, kept: Sequence[bool]) -> Rows:
        """Without some of the rows, as when a request is aborted."""
        slots = [slot for slot, keep in zip(self.slots, kept, strict=True) if keep]
        at = np.cumsum(kept) - 1
        segments = []
        for first, count, begin, end in zip(
            self.tree.first, self.tree.count, self.tree.begin, self.tree.end, strict=True
        ):
            inside = np.flatnonzero(kept[first : first + count])
            if len(inside):
                segments.append((at[first + inside[0]], len(inside), begin, end))
        columns = np.array(segments, np.int32).reshape(-1, 4).T
        return Rows(slots, RowTree(*columns, self.tree.own[np.array(kept)]))  # type: ignore[arg-type]


def requests(
    world: World, prompts: Sequence[int], beams: int, children: int, history: int, own: int
) -> Rows:
    """Rows of several requests: prompt, fork, history, fork, own; pages get out of order."""
    slots: list[int] = []
    levels: list[list[list[int]]] = [[[], []], [[], []]]
    for r, prompt in enumerate(prompts):
        spare = world.new(world.pool.page_size + 1)
        root = world.new(prompt)
        heads = world.fork(root, beams)
        world.release(spare)  # holes for the histories' pages
        for token in range(history):
            for head in heads:
                world.grow(head, 1)
            if token == 1:
                world.release(world.new(1))
        for b, head in enumerate(heads):
            rows = world.fork(head, children)
            for row in rows:
                world.grow(row, own)
                slots.append(row)
                levels[0][0].append(r)
                levels[0][1].append(prompt)
                levels[1][0].append(r * beams + b)
                levels[1][1].append(prompt + history)
    tree = RowTree.of([Level(*level) for level in levels], len(slots))
    return Rows(slots, tree)


def assert_close(out: Tensor, expected: Tensor) -> None:
    tolerance = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 6e-3}
    room = tolerance.get(out.dtype, 5e-2)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=room)
