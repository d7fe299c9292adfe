"""Cases of the paged attention for :mod:`bench.kernels`: rows of searches with W = K = 4.

An input set is a layer: so many that together they exceed the L2 cache, as a model's do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from bench.kernel_cases import Case, Scale, Work
from bench.timing import input_sets
from w2s_fast.attention import KernelPlan, Level, RowTree
from w2s_fast.cache import Int32Array, PagePool
from w2s_fast.kernels.paged_attention import paged_attention


class Heads(NamedTuple):
    """Of queries, of keys and values, and their size."""

    queries: int
    keys: int
    dim: int


TINY = Heads(4, 2, 16)
LARGE = Heads(32, 8, 128)  # of the 8B


def attention_cases(device: torch.device, scale: Scale) -> Iterator[Case]:
    """All of them; none for a CPU, whose attention :mod:`bench.cpu_attention` times."""
    if scale == "cpu":
        return
    heads = TINY if scale == "tiny" else LARGE
    for requests, prompt, history, new in (
        [(2, 40, 20, 1), (1, 40, 20, 3)]
        if scale == "tiny"
        else [(1, 4096, 64, 1), (64, 512, 64, 1), (1, 4096, 64, 5), (64, 512, 64, 5)]
    ):
        for shares in (True, False):
            yield _attention(device, heads, requests, prompt, history, new, shares)
    yield _append(device, heads, *((40, 20, 3) if scale == "tiny" else (512, 64, 30)))


class Search(NamedTuple):
    """Rows of W = K = 4 in a pool, and what they share."""

    pool: PagePool
    slots: Int32Array
    tree: RowTree
    moved: int  # bytes of distinct keys and values in a layer

    def plan(self, new: int, shares: bool) -> KernelPlan:
        counts = np.full(len(self.slots), new, np.int32)
        return KernelPlan.make(self.pool, self.slots, counts, self.tree if shares else None)


def search(
    device: torch.device, heads: Heads, requests: int, prompt: int, history: int, new: int
) -> Search:
    """A chunk begins: no row has tokens of its own but the new ones."""
    size, rows = 16, 16 * requests
    tokens = requests * (prompt + 4 * history + 16 * new)
    moved = tokens * 2 * heads.keys * heads.dim * 2
    pages = requests * (prompt // size + 4 * (history // size) + 16 * (new // size) + 64)
    longest = prompt + history + new
    pool = PagePool(
        input_sets(moved, 16), heads.keys, heads.dim, pages, size, 2 * rows, longest,
        torch.bfloat16, device,
    )  # fmt: skip
    pool.kv.normal_()
    slots = pool.allocate(requests)
    for length in (prompt, history):
        pool.reserve(slots, [length] * len(slots))
        pool.extend(slots, [length] * len(slots))
        children = pool.fork(slots, [4] * len(slots))
        pool.release(slots)
        slots = children
    pool.reserve(slots, [new] * rows)
    row = np.arange(rows)
    levels = [
        Level(row // 16, np.full(rows, prompt)),
        Level(row // 4, np.full(rows, prompt + history)),
    ]
    return Search(pool, slots, RowTree.of(levels, rows), moved)


def queries_of(device: torch.device, heads: Heads, tokens: int) -> torch.Tensor:
    return torch.randn(tokens, heads.queries, heads.dim, device=device).bfloat16()


def _attend(plan: KernelPlan, layer: int, q: torch.Tensor) -> torch.Tensor:
    return paged_attention(
        q, plan.pool.kv[layer], plan.page_table, plan.lengths, plan.cu_seqlens_q,
        scale=q.shape[2] ** -0.5, max_q=plan.max_q, max_k=plan.max_k,
        max_own=plan.max_own, shared=plan.shared, table_start=plan.table_start,
    )  # fmt: skip


def _attention(
    device: torch.device,
    heads: Heads,
    requests: int,
    prompt: int,
    history: int,
    new: int,
    shares: bool,
) -> Case:
    def make() -> Work:
        found = search(device, heads, requests, prompt, history, new)
        plan = found.plan(new, shares)
        q = queries_of(device, heads, len(found.slots) * new)
        return Work(lambda layer: _attend(plan, layer, q), range(len(found.pool.kv)), found.moved)

    shape = f"{requests} x 16 rows of {new}, prompt {prompt}, {'shared' if shares else 'plain'}"
    return Case("paged_attention", shape, make)


def _append(device: torch.device, heads: Heads, prompt: int, history: int, new: int) -> Case:
    """Beside SDPA, whose keys and values have been gathered before."""

    def make() -> Work:
        found = search(device, heads, 1, prompt, history, new)
        plan, pool = found.plan(new, True), found.pool
        q = queries_of(device, heads, 16 * new)
        page = pool.page_table(found.slots).long()
        dense = [kv[:, page].flatten(2, 3)[:, :, : plan.max_k].transpose(2, 3) for kv in pool.kv]
        rows = q.unflatten(0, (16, new)).transpose(1, 2)
        position = torch.arange(plan.max_k, device=device)
        seen = position <= position[-new:, None]

        def sdpa(layer: int) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(
                rows, *dense[layer], attn_mask=seen, enable_gqa=True
            )

        expected = sdpa(0).transpose(1, 2).flatten(0, 1)
        torch.testing.assert_close(_attend(plan, 0, q), expected, atol=2e-2, rtol=2e-2)
        return Work(
            lambda layer: _attend(plan, layer, q),
            range(len(dense)),
            found.moved,
            beside={"to SDPA on gathered keys": sdpa},
        )

    return Case("paged_attention", f"append {16 * new} tokens, prompt {prompt}", make)
