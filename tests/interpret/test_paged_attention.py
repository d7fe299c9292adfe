"""The kernels of paged_attention give what float64 gives, however rows are cut and laid out."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.interpret.attention import launched
from tests.interpret.rule import DEVICE, DTYPES, assert_as_exact_as_torch, compiled_for
from tests.kernels.test_paged_attention import MIXED, NAN, Case, exact, make_case
from tests.support.drawn import drawn
from w2s_fast.kernels import paged_attention as module
from w2s_fast.kernels import paged_attention_triton as kernels
from w2s_fast.kernels.paged_attention import SharedSegments, paged_attention


def attend(case: Case, **rule: Any) -> Tensor:
    if rule.get("sinks") is not None:
        rule["sinks"] = rule["sinks"].to(DEVICE)
    return paged_attention(*case.to(DEVICE).tensors(), **rule, **case.bounds()).cpu()


def check(case: Case, **rule: Any) -> Tensor:
    got = attend(case, **rule)
    assert got.dtype == case.q.dtype
    alone = dict(zip(SharedSegments._fields, module._NOTHING_SHARED))
    given = {"window": None, "softcap": None, "sinks": None, **alone, **rule}
    plain = module._torch(*case.tensors(), **given, **case.bounds())
    assert_as_exact_as_torch(got, plain, exact(case, **rule), case.q.dtype)
    return got


def rows(most: int = 3) -> st.SearchStrategy[list[tuple[int, int]]]:
    """(new tokens, keys) with keys on both sides of the borders of pages, blocks and splits."""
    before = st.one_of(st.integers(0, 70), st.sampled_from([0, 15, 16, 17, 31, 32, 33, 47, 48, 63]))
    row = st.tuples(st.one_of(st.integers(0, 3), st.just(1), st.integers(0, 18)), before)
    return st.lists(row.map(lambda r: (r[0], r[0] + r[1])), min_size=1, max_size=most)


@drawn(60)
@given(
    rows=rows(),
    heads=compiled_for([(1, 1), (2, 2), (4, 2), (3, 1), (7, 1)], (4, 2)),
    dim=compiled_for([8, 16, 24, 32], 16),
    page_size=compiled_for([1, 3, 16, 32, 48], 3),
    shared=st.integers(0, 3),
    tile=compiled_for([16, 32], 16),
    split_keys=compiled_for([16, 32, 1024], 32),
    split_queries=compiled_for([1, 4, 16], 16),
    window=compiled_for([None, None, 1, 5, 16, 17, 40], 5, 17, 40),
    softcap=compiled_for([None, None, 3.0], 3.0),
    with_sinks=compiled_for([True, False], True),
    slack=st.sampled_from([0, 0, 5]),
    dtype=compiled_for(DTYPES, torch.float32),
    seed=st.integers(0, 2**16),
)
def test_every_layout_gives_the_definition(
    rows: list[tuple[int, int]],
    heads: tuple[int, int],
    dim: int,
    page_size: int,
    shared: int,
    tile: int,
    split_keys: int,
    split_queries: int,
    window: int | None,
    softcap: float | None,
    with_sinks: bool,
    slack: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    case = make_case(rows, *heads, dim, page_size, shared, dtype, seed, slack)
    draw = torch.Generator().manual_seed(seed)
    sinks = torch.randn(heads[0], generator=draw).to(dtype) if with_sinks else None
    with launched(tile, split_keys, split_queries):
        check(case, scale=dim**-0.5, window=window, softcap=softcap, sinks=sinks)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_the_launch_table_gives_the_definition(dim: int, dtype: torch.dtype) -> None:
    check(make_case([(1, 65), (1, 64), (1, 3)], dim=dim, dtype=dtype), scale=dim**-0.5)
    check(make_case([(20, 65), (2, 2)], dim=dim, dtype=dtype), scale=dim**-0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_rows_are_cut_and_merged(dtype: torch.dtype) -> None:
    case = make_case([(1, 1100), (2, 513), (1, 512), (1, 7)], 2, 1, dtype=dtype)
    check(case, scale=0.25)
    check(case, scale=0.25, window=600, softcap=5.0, sinks=torch.randn(2))


def test_a_window_that_begins_inside_a_block_may_take_one_split_more() -> None:
    with launched(16, 32):
        check(make_case([(1, 80)]), scale=0.25, window=65)  # 65 keys from 15 on, blocks from 0 on
        check(make_case([(3, 82), (1, 90)]), scale=0.25, window=65)


def test_a_second_launch_finishes_only_rows_that_were_cut() -> None:
    finish = mock.MagicMock()
    with launched(16, 32), mock.patch.object(kernels, "finish", finish):
        attend(make_case([(1, 32)]), scale=0.25)
        finish.__getitem__.assert_not_called()
        attend(make_case([(1, 33)]), scale=0.25)
        finish.__getitem__.assert_called_once_with((1,))  # all 4 heads
        attend(make_case([(1, 500)]), scale=0.25, window=17)  # fits into one split: no cut
        finish.__getitem__.assert_called_once()


@drawn(12)
@given(
    rows=rows(),
    split_keys=compiled_for([16, 32], 32),
    split_queries=compiled_for([1, 4, 16], 16),
    window=compiled_for([None, 5, 33], 5, 33),
    with_sinks=compiled_for([True, False], True),
    seed=st.integers(0, 2**16),
)
def test_a_row_gives_the_same_bits_alone_and_among_others(
    rows: list[tuple[int, int]],
    split_keys: int,
    split_queries: int,
    window: int | None,
    with_sinks: bool,
    seed: int,
) -> None:
    """Under the bounds of all rows, and under its own: another tile, and maybe no second launch."""
    case = make_case(rows, shared=1, seed=seed)
    sinks = torch.randn(4) if with_sinks else None
    with launched(16, split_keys, split_queries):
        together = attend(case, scale=0.25, window=window, sinks=sinks)
        for index, (new, length) in enumerate(rows):
            alone = case.row(index)
            own = together[case.cu_seqlens_q[index] : case.cu_seqlens_q[index + 1]]
            got = attend(alone, scale=0.25, window=window, sinks=sinks)
            assert torch.equal(got, own)
            alone = alone._replace(max_q=new, max_k=length)
            # A GPU's threads add up a row of another tile in another order.
            with launched(32 if DEVICE == "cpu" else 16, split_keys, split_queries):
                got = attend(alone, scale=0.25, window=window, sinks=sinks)
            assert torch.equal(got, own)


@pytest.mark.parametrize("split_keys", [32, 1024])
def test_nan_in_a_row_stays_in_it(split_keys: int) -> None:
    case = make_case(MIXED)
    with launched(16, split_keys):
        clean = attend(case, scale=0.25)
        poisoned = case._replace(pages=case.pages.clone())
        poisoned.pages[1, case.page_table[5, 0], 3] = NAN  # a value of the row of tokens 10 and 11
        got = attend(poisoned, scale=0.25)
        assert got[10:].isnan().all() and torch.equal(got[:10], clean[:10])
        q = case.q.clone()
        q[0, 1] = NAN
        got = attend(case._replace(q=q), scale=0.25)
        assert got[0, 1].isnan().all() and torch.equal(got[1:], clean[1:])
        assert torch.equal(got[0, [0, 2, 3]], clean[0, [0, 2, 3]])


@pytest.mark.parametrize("split_keys", [16, 1024])
def test_logits_far_apart_do_not_overflow(split_keys: int) -> None:
    case = make_case([(1, 40), (3, 35)])
    with launched(16, split_keys):
        for level in (1e-20, 30.0, 1e4):
            check(case._replace(q=case.q * level), scale=1.0, sinks=torch.zeros(4))


@pytest.mark.parametrize("split_keys", [16, 1024])
def test_a_query_that_sees_no_key_gives_zero(split_keys: int) -> None:
    case = make_case([(1, 5), (1, 39), (3, 9)])
    case.lengths[0] = 0
    case.lengths[2] = 2
    case.page_table[0] = -1
    with launched(16, split_keys):
        got = check(case, scale=0.25)
        assert (got[[0, 2]] == 0).all()
        check(case, scale=0.25, sinks=torch.zeros(4), window=3)


@pytest.mark.parametrize("split_keys", [32, 1024])
def test_tensors_may_lie_at_any_stride(split_keys: int) -> None:
    case = make_case(MIXED)
    with launched(16, split_keys):
        expected = check(case, scale=0.25)
        heads_first = case.q.transpose(0, 1).contiguous().transpose(0, 1)
        assert torch.equal(check(case._replace(q=heads_first), scale=0.25), expected)
        strided = case.q.repeat_interleave(2, dim=-1)[..., ::2]
        assert torch.equal(check(case._replace(q=strided), scale=0.25), expected)
        wide = torch.cat([case.page_table, torch.full((7, 5), -1)], 1).int()[:, :-3]
        assert torch.equal(check(case._replace(page_table=wide), scale=0.25), expected)
        spread = case.page_table.repeat_interleave(2, dim=-1)[:, ::2]
        assert torch.equal(check(case._replace(page_table=spread), scale=0.25), expected)


@pytest.mark.parametrize("rows", [[], [(0, 0)], [(0, 7), (0, 30)]])
def test_no_queries_give_nothing(rows: list[tuple[int, int]]) -> None:
    assert attend(make_case(rows), scale=0.25).shape == (0, 4, 16)


def test_the_operator_is_served_by_the_kernels() -> None:
    with mock.patch.object(module, "_torch", None):
        attend(make_case(MIXED), scale=0.25)
