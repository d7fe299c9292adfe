"""Ragged tables of pages give the bits of full ones, and what no row needs need not exist."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.forests import Request, assert_tables_agree, make_forest, strewn_tables
from tests.kernels.test_paged_attention import check
from tests.support.drawn import drawn
from tests.support.no_host import NoHost
from w2s_fast.kernels.paged_attention import paged_attention

requests = st.builds(
    Request,
    prompt=st.one_of(st.integers(1, 90), st.sampled_from([16, 32, 48])),
    levels=st.lists(
        st.tuples(st.integers(1, 3), st.integers(0, 20), st.integers(20, 40)), max_size=3
    ).map(tuple),
    new=st.sampled_from([(1, 1), (0, 2), (1, 4), (14, 19)]),
    shares=st.sampled_from([True, True, False]),
)


@drawn(60)
@given(
    requests=st.lists(requests, min_size=1, max_size=3),
    page_size=st.sampled_from([1, 3, 16, 48]),
    window=st.sampled_from([None, None, 1, 9, 40]),
    with_sinks=st.booleans(),
    aborted=st.sampled_from([0.0, 0.5]),
    shared=st.sampled_from([True, True, False]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_ragged_tables_give_the_bits_of_full_ones(
    requests: list[Request],
    page_size: int,
    window: int | None,
    with_sinks: bool,
    aborted: float,
    shared: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    forest = make_forest(requests, page_size=page_size, dtype=dtype, aborted=aborted, seed=seed)
    sinks = torch.randn(4).to(dtype) if with_sinks else None
    assert_tables_agree(forest, shared, seed, scale=0.25, window=window, sinks=sinks)


def test_tables_agree_with_the_definition_and_wait_for_nothing() -> None:
    forest = make_forest([Request(600, ((2, 30, 40), (3, 3, 9)), (1, 3)), Request(40)])
    plan = forest.plan()
    table, start = strewn_tables(forest, plan, seed=0)
    assert plan.shared is not None and (start < 0).any() and (start > 0).any()
    expected = check(forest.case(plan), scale=0.25)
    with NoHost():
        found = paged_attention(
            forest.queries, forest.pool.kv[0], table, plan.lengths, plan.cu_seqlens_q, scale=0.25,
            max_q=plan.max_q, max_k=plan.max_k, max_own=plan.max_own, shared=plan.shared,
            table_start=start,
        )  # fmt: skip
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("sinks", [None, torch.zeros(4)])
def test_rows_of_no_keys_need_no_entry(sinks: torch.Tensor | None) -> None:
    nothing, ints = torch.empty(0, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    found = paged_attention(
        torch.randn(2, 4, 8), torch.randn(2, 3, 16, 2, 8), nothing, ints,
        torch.tensor([0, 1, 2], dtype=torch.int32), scale=1.0, sinks=sinks, max_q=1, max_k=9,
        table_start=ints,
    )  # fmt: skip
    assert found.shape == (2, 4, 8) and (found == 0).all()
