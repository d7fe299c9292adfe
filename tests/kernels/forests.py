"""Rows as a search makes them: trees of hypotheses in a real page pool, and what they share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.kernels.test_paged_attention import Case
from w2s_fast.attention.kernel import KernelPlan
from w2s_fast.attention.row_tree import Level, RowTree
from w2s_fast.cache.pages import PagePool
from w2s_fast.kernels.paged_attention import paged_attention


@dataclass(frozen=True)
class Request:
    """One tree: a prompt, then a level of children for each item of ``levels``.

    Attributes:
        prompt: tokens. levels: (children of each node, the fewest tokens of a child, the most).
        new: the fewest and most new tokens of a row. shares: whether the search tells.
    """

    prompt: int
    levels: tuple[tuple[int, int, int], ...] = ()
    new: tuple[int, int] = (1, 1)
    shares: bool = True


@dataclass
class Forest:
    """Rows in a pool that is garbage where nothing was written; one layer.

    Attributes:
        slots, counts: [S], as plans take them. queries: [T, H, D].
        request: [S], the index of each row's request.
        groups, ends: [levels, S], as Level has them: the last level, of a row alone, is left out.
    """

    pool: PagePool
    slots: np.ndarray[Any, np.dtype[np.int32]]
    counts: np.ndarray[Any, np.dtype[np.int32]]
    queries: Tensor
    request: np.ndarray[Any, np.dtype[np.int64]]
    groups: np.ndarray[Any, np.dtype[np.int64]]
    ends: np.ndarray[Any, np.dtype[np.int64]]

    def tree(self, rows: np.ndarray[Any, Any] | None = None) -> RowTree:
        chosen = np.arange(len(self.slots)) if rows is None else rows
        levels = [Level(g[chosen], e[chosen]) for g, e in zip(self.groups, self.ends)]
        return RowTree.of(levels, len(chosen))

    def plan(self, rows: np.ndarray[Any, Any] | None = None, shared: bool = True) -> KernelPlan:
        """Of some rows, in this order; of all by default."""
        chosen = np.arange(len(self.slots)) if rows is None else rows
        tree = self.tree(chosen) if shared else None
        return KernelPlan.make(self.pool, self.slots[chosen], self.counts[chosen], tree)

    def queries_of(self, rows: np.ndarray[Any, Any]) -> Tensor:
        parts = self.queries.split(self.counts.tolist())
        return torch.cat([parts[row] for row in rows])

    def case(self, plan: KernelPlan) -> Case:
        """All rows, as the tests of paged_attention have them, on the CPU."""
        table = self.pool.page_table(self.slots)
        tensors = (self.queries, self.pool.kv[0], table, plan.lengths, plan.cu_seqlens_q)
        return Case(*(t.cpu() for t in tensors), plan.max_q, plan.max_k)


def make_forest(
    requests: list[Request],
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 16,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    aborted: float = 0.0,
    seed: int = 0,
) -> Forest:
    """``aborted``: the share of rows that are left out of the launch; at least one stays."""
    draw = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    leaves = sum(int(np.prod([n for n, *_ in r.levels])) for r in requests)
    longest = max(r.prompt + sum(most for *_, most in r.levels) + r.new[1] for r in requests)
    per_slot = -(-longest // page_size) + 1
    slots = 4 * leaves + 4 * len(requests) + 1
    pool = PagePool(
        1, kv_heads, dim, slots * per_slot, page_size, slots, per_slot * page_size, dtype, device
    )
    pool.kv.fill_(torch.nan)
    pool.reserve(pool.allocate(1), [1])  # what a masked entry of a table reads as: garbage, too

    def write(slot: int, tokens: int) -> None:
        """New keys and values, which do not count yet."""
        pool.reserve([slot], [tokens])
        where = pool.places([slot], [tokens])
        new = torch.randn(2, tokens, kv_heads, dim, generator=generator)
        pool.kv[0].flatten(1, 2)[:, where] = new.to(dtype).to(device)

    depth = 1 + max(len(r.levels) for r in requests)
    found: list[tuple[int, int, list[int], list[int]]] = []  # slot, request, groups, ends
    names = iter(range(1_000_000))
    for index, request in enumerate(requests):
        (root,) = pool.allocate(1).tolist()
        write(root, request.prompt)
        pool.extend([root], [request.prompt])
        nodes = [(root, [next(names)], [request.prompt])]
        for children, fewest, most in request.levels:
            below = []
            for slot, groups, ends in nodes:
                forked = pool.fork([slot], [children]).tolist()
                pool.release([slot])
                for child in forked:
                    tokens = int(draw.integers(fewest, most + 1))
                    if tokens:
                        write(child, tokens)
                        pool.extend([child], [tokens])
                    below.append((child, [*groups, next(names)], [*ends, ends[-1] + tokens]))
            nodes = below
        for slot, groups, ends in nodes:
            # The last level is a row alone, which a search does not list.
            groups, ends = groups[:-1] or groups, ends[:-1] or ends
            if not request.shares:
                groups = [-1] * len(groups)
            missing = depth - len(groups)
            found.append((slot, index, groups + [-1] * missing, ends + ends[-1:] * missing))
    kept = [row for row in found if draw.random() >= aborted] or found[:1]
    counts = np.array([draw.integers(requests[i].new[0], requests[i].new[1] + 1)
                       for _, i, *_ in kept], np.int32)  # fmt: skip
    for (slot, *_), tokens in zip(kept, counts.tolist()):
        write(slot, tokens)
    return Forest(
        pool,
        np.array([slot for slot, *_ in kept], np.int32),
        counts,
        torch.randn(int(counts.sum()), heads, dim, generator=generator).to(dtype).to(device),
        np.array([i for _, i, *_ in kept]),
        np.array([groups for *_, groups, _ in kept]).T,
        np.array([ends for *_, ends in kept]).T,
    )


def strewn_tables(forest: Forest, plan: KernelPlan, seed: int) -> tuple[Tensor, Tensor]:
    """The tables of a plan of all rows, once more: page_table int32 [P], and table_start.

    The entries that a row needs stand alone, in any order of rows. All others, between them and
    around them, are a page of NaN.
    """
    size, tables = forest.pool.page_size, forest.pool.page_table(forest.slots).tolist()
    first, splits = [0] * len(tables), []
    if plan.shared is not None:
        first, splits = plan.shared.own.tolist(), plan.shared.splits.tolist()
    for _, tokens, begin, _, row, _ in splits:
        first[row] = min(first[row], begin) if tokens else first[row]
    bad = [int(forest.pool.page_table([0])[0, 0])] * 3
    assert forest.pool.kv[:, :, bad].isnan().all()
    found, starts = list(bad), [0] * len(tables)
    for row in np.random.default_rng(seed).permutation(len(tables)):
        begin, end = first[row] // size, -(-int(plan.lengths[row]) // size)
        starts[row] = len(found) - begin
        found += tables[row][begin:end] + bad
    device = plan.page_table.device
    return (
        torch.tensor(found, dtype=torch.int32, device=device),
        torch.tensor(starts, dtype=torch.int32, device=device),
    )


def assert_tables_agree(forest: Forest, shared: bool, seed: int, **rule: Any) -> None:
    """Full tables, the plan's, and those of :func:`strewn_tables` give the same bits."""
    plan = forest.plan(shared=shared)
    found = attend(forest, plan, **rule)
    assert found.isfinite().all()
    full = paged_attention(
        forest.queries, forest.pool.kv[0], forest.pool.page_table(forest.slots), plan.lengths,
        plan.cu_seqlens_q, **rule, max_q=plan.max_q, max_k=plan.max_k, max_own=plan.max_own,
        shared=plan.shared,
    ).cpu()  # fmt: skip
    assert torch.equal(found, full)
    table, start = strewn_tables(forest, plan, seed)
    # Every other entry of a larger table: what is strided is read in place, or copied.
    for page_table in (table, table.repeat_interleave(2)[::2]):
        strewn = replace(plan, page_table=page_table, table_start=start)
        assert torch.equal(attend(forest, strewn, **rule), full)


def attend(forest: Forest, plan: KernelPlan, queries: Tensor | None = None, **rule: Any) -> Tensor:
    """What the operator gives for a plan of all rows, or of those that ``queries`` are of."""
    return paged_attention(
        forest.queries if queries is None else queries, forest.pool.kv[0], plan.page_table,
        plan.lengths, plan.cu_seqlens_q, **rule, max_q=plan.max_q, max_k=plan.max_k,
        max_own=plan.max_own, shared=plan.shared, table_start=plan.table_start,
    ).cpu()  # fmt: skip
