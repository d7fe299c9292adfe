"""Attention over a forest of hypotheses is dense attention, whoever reads the shared keys."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.interpret.attention import check, launched, trees
from tests.interpret.rule import DEVICE, DTYPES, compiled_for
from tests.kernels.forests import Forest, Request, assert_tables_agree, attend, make_forest
from tests.kernels.test_paged_attention import NAN
from tests.support.drawn import drawn
from w2s_fast.attention.contract import LayerOptions
from w2s_fast.attention.kernel import KernelPlan


@drawn(30)
@given(
    requests=trees(),
    heads=compiled_for([(1, 1), (2, 2), (4, 2), (7, 1)], (4, 2)),
    dim=compiled_for([16, 24], 24),
    page_size=compiled_for([1, 3, 16, 48], 3),
    tiles=compiled_for([(16, 16), (16, 32), (32, 16)], (16, 32)),
    split_keys=compiled_for([16, 32, 512], 32),
    window=compiled_for([None, None, 1, 9, 17, 40], 9, 17, 40),
    softcap=compiled_for([None, None, 3.0], None),
    with_sinks=compiled_for([True, False], False),
    aborted=st.sampled_from([0.0, 0.0, 0.4]),
    dtype=compiled_for(DTYPES, torch.float32),
    seed=st.integers(0, 2**16),
)
def test_every_forest_gives_the_definition(
    requests: list[Request],
    heads: tuple[int, int],
    dim: int,
    page_size: int,
    tiles: tuple[int, int],
    split_keys: int,
    window: int | None,
    softcap: float | None,
    with_sinks: bool,
    aborted: float,
    dtype: torch.dtype,
    seed: int,
) -> None:
    forest = make_forest(requests, *heads, dim, page_size, dtype, DEVICE, aborted, seed)
    draw = torch.Generator().manual_seed(seed)
    sinks = torch.randn(heads[0], generator=draw).to(dtype).to(DEVICE) if with_sinks else None
    with launched(tiles[0], split_keys, shared_tile=tiles[1]):
        check(forest, forest.plan(), scale=dim**-0.5, window=window, softcap=softcap, sinks=sinks)


@drawn(10)
@given(
    requests=trees(),
    page_size=compiled_for([1, 3, 16, 48], 16),
    split_keys=compiled_for([16, 32, 512], 32),
    window=compiled_for([None, None, 1, 9, 17, 40], None),
    shared=st.sampled_from([True, True, False]),
    aborted=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 2**16),
)
def test_ragged_tables_give_the_bits_of_full_ones(
    requests: list[Request],
    page_size: int,
    split_keys: int,
    window: int | None,
    shared: bool,
    aborted: float,
    seed: int,
) -> None:
    forest = make_forest(requests, page_size=page_size, device=DEVICE, aborted=aborted, seed=seed)
    with launched(split_keys=split_keys):
        assert_tables_agree(forest, shared, seed, scale=0.25, window=window)


SEARCH = Request(61, ((3, 18, 70), (2, 1, 4)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 80, 256])
def test_the_launch_table_gives_the_definition(dim: int, dtype: torch.dtype) -> None:
    request = Request(70, ((2, 18, 30), (2, 1, 4)), (1, 2))
    forest = make_forest([request], dim=dim, dtype=dtype, device=DEVICE)
    check(forest, forest.plan(), scale=dim**-0.5)


def needed(forest: Forest, plan: KernelPlan) -> Tensor:
    """bool [pages, page_size]: what stands where the launch has to read it."""
    assert plan.shared is not None
    size, table = forest.pool.page_size, forest.pool.page_table(forest.slots).cpu()
    read = torch.zeros(forest.pool.kv.shape[2:4], dtype=torch.bool)
    runs = [(row, begin, end) for _, _, begin, end, row, _ in plan.shared.splits.tolist()]
    runs += zip(range(len(plan.lengths)), plan.shared.own.tolist(), plan.lengths.tolist())
    for row, begin, end in runs:
        for t in range(begin, end):
            read[table[row, t // size], t % size] = True
    return read


@contextmanager
def new_tensors_of_nan() -> Iterator[None]:
    """What torch.empty gives may be anything, so nothing may be read before it is written."""
    empty = torch.empty
    with mock.patch.object(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(NAN)):
        yield


@pytest.mark.parametrize("page_size", [3, 16])
@pytest.mark.parametrize("window", [None, 40, 60])
def test_a_segment_is_read_from_its_first_rows_pages_alone(
    window: int | None, page_size: int
) -> None:
    """Everything else may be garbage: copies in the other rows' pages, and all free pages."""
    forest = make_forest([SEARCH, Request(33, ((3, 2, 5),))], page_size=page_size, device=DEVICE)
    with launched():
        plan = forest.plan()
        expected = check(forest, plan, scale=0.25, window=window)
        unread = ~needed(forest, plan)
        copies = unread & forest.pool.kv[0, 0, :, :, 0, 0].cpu().isfinite()
        assert copies.any()
        forest.pool.kv[0][:, unread.to(DEVICE)] = NAN
        with new_tensors_of_nan():
            got = attend(forest, plan, scale=0.25, window=window)
        assert torch.equal(got, expected)


def rows_of(forest: Forest, out: Tensor, rows: np.ndarray[Any, Any]) -> Tensor:
    parts = out.split(forest.counts.tolist())
    return torch.cat([parts[row] for row in rows])


@pytest.mark.parametrize("window", [None, 33])
@pytest.mark.parametrize("seed", range(2))
def test_a_row_gives_the_same_bits_whichever_rows_run_beside_it(
    seed: int, window: int | None
) -> None:
    requests = [
        Request(50, ((2, 18, 30), (2, 1, 4)), (1, 2)),
        Request(35, ((2, 0, 5), (2, 1, 4)), (1, 3)),
        Request(40, shares=False),
    ]
    forest = make_forest(requests, device=DEVICE, seed=seed)
    draw = np.random.default_rng(seed)
    count = len(forest.slots)
    chosen = [
        np.flatnonzero(forest.request == 1),  # a request alone
        np.argsort(-forest.request, kind="stable"),  # other neighbours
        np.flatnonzero(draw.random(count) < 0.5),  # some are aborted
        np.array([draw.integers(count)]),  # a row alone
    ]
    rule = {"scale": 0.25, "window": window, "sinks": torch.randn(4).to(DEVICE)}
    with launched():
        everyone = attend(forest, forest.plan(), **rule)
        for rows in chosen:
            if len(rows):
                got = attend(forest, forest.plan(rows), forest.queries_of(rows), **rule)
                assert torch.equal(got, rows_of(forest, everyone, rows))
        # A row that shares nothing gives what it gives where nobody does.
        alone = np.flatnonzero(forest.request == 2)
        plain = attend(forest, forest.plan(shared=False), **rule)
        assert torch.equal(rows_of(forest, plain, alone), rows_of(forest, everyone, alone))
        assert not torch.equal(plain, everyone)  # other sums: the plan does make a difference


def test_the_table_of_float32_gives_the_same_bits_whoever_runs() -> None:
    forest = make_forest([Request(600, ((2, 18, 30), (2, 1, 4))), Request(40)], device=DEVICE)
    everyone = attend(forest, forest.plan(), scale=0.25)
    rows = np.array([1, 2])
    got = attend(forest, forest.plan(rows), forest.queries_of(rows), scale=0.25)
    assert torch.equal(got, rows_of(forest, everyone, rows))


@pytest.mark.parametrize("window", [None, 20])
def test_steps_under_one_plan_equal_steps_under_new_plans(window: int | None) -> None:
    """Tails that grow over the border of a block and a split, and of a page."""
    forest = make_forest([Request(40, ((2, 17, 30), (2, 10, 14))), Request(21)], device=DEVICE)
    pool, slots, ones = forest.pool, forest.slots, forest.counts
    options = LayerOptions(scale=0.25, window=window, softcap=None, sinks=None)
    steps, tree = 7, forest.tree()
    pool.reserve(slots, ones * steps)
    with launched(split_keys=16):
        plan = KernelPlan.make(pool, slots, ones, tree, ahead=steps - 1)
        shared, begins = plan.shared, plan.positions.clone()
        for step in range(steps):
            if step:
                plan.advance()
            q, (k, v) = torch.randn(len(slots), 4, 16), torch.randn(2, len(slots), 2, 16)
            tensors = [x.to(DEVICE) for x in (q, k, v)]
            got = plan.attend(0, *tensors, options)
            new = KernelPlan.make(pool, slots, ones, tree)
            assert torch.equal(got, new.attend(0, *tensors, options))
            for ours, theirs in zip(
                (plan.write, plan.positions, plan.lengths, plan.cu_seqlens_q),
                (new.write, new.positions, new.lengths, new.cu_seqlens_q),
            ):
                assert torch.equal(ours, theirs)
            assert plan.shared is shared and new.shared is not None and shared is not None
            for a, b in zip(shared[:4], new.shared[:4]):
                assert torch.equal(a, b)
            pool.extend(slots, ones)
        assert torch.equal(plan.positions, begins + steps - 1)
