"""The kernels of linear_logprob give what float64 gives, at every edge of their tiles."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.interpret.products import products_in_order
from tests.interpret.rule import (
    DEVICE,
    DTYPES,
    assert_as_exact_as_torch,
    compiled_for,
    exact_logprob,
)
from tests.support.drawn import drawn
from w2s_fast.kernels import linear_logprob as module
from w2s_fast.kernels.linear_logprob import linear_logprob
from w2s_fast.kernels.linear_logprob_partials import linear_logprob_partials


def check(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    hidden, weight, tokens = hidden.to(DEVICE), weight.to(DEVICE), tokens.to(DEVICE)
    bias = None if bias is None else bias.to(DEVICE)
    with mock.patch.object(module, "_product_pays", return_value=False):
        got = linear_logprob(hidden, weight, tokens, bias, softcap, scale, vocab_size)
    assert got.dtype == torch.float32
    rest = (softcap, scale, vocab_size)
    plain = module._torch(hidden, weight, tokens, bias, *rest)
    logits = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    exact = exact_logprob(logits, tokens, vocab_size, scale, softcap)
    assert_as_exact_as_torch(got, plain, exact, hidden.dtype)
    return got.cpu()


@drawn(20)
@given(
    rows=st.one_of(st.integers(1, 18), compiled_for([31, 33, 65], 9)),
    # Around one and two tiles of 64 (float32) and 128.
    vocabulary=st.one_of(st.integers(1, 5), st.integers(60, 68), st.integers(125, 131)),
    padding=st.integers(0, 9),
    width=compiled_for([1, 16, 31, 32, 33, 64, 65, 100, 128], 65),
    dtype=compiled_for(DTYPES, torch.float32),
    bias=compiled_for([True, False], True),
    scale=st.sampled_from([1.0, 0.25]),
    softcap=st.sampled_from([None, 5.0, 30.0]),
    seed=st.integers(0, 2**16),
)
def test_every_edge_gives_the_definition(
    rows: int,
    vocabulary: int,
    padding: int,
    width: int,
    dtype: torch.dtype,
    bias: bool,
    scale: float,
    softcap: float | None,
    seed: int,
) -> None:
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=draw).to(dtype)
    weight = torch.randn(vocabulary + padding, width, generator=draw).to(dtype)
    weight[vocabulary:] = math.nan  # padding must not be let in
    b = torch.randn(vocabulary + padding, generator=draw).to(dtype) if bias else None
    tokens = torch.randint(vocabulary, (rows,), generator=draw)
    check(hidden, weight, tokens, b, softcap, scale, vocabulary)


def test_many_rows_take_several_blocks() -> None:
    hidden, weight = torch.randn(150, 40).half(), torch.randn(150, 40).half()
    check(hidden, weight, torch.randint(150, (150,)))


def test_equal_rows_give_equal_bits() -> None:
    hidden, weight = torch.randn(1, 40).expand(20, -1), torch.randn(150, 40)
    with products_in_order():
        got = check(hidden.contiguous(), weight, torch.full((20,), 140))
    assert torch.equal(got, got[:1].expand(20))


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_logits_are_uniform(dtype: torch.dtype) -> None:
    hidden, weight = torch.ones(3, 16, dtype=dtype), torch.ones(131, 16, dtype=dtype)
    got = check(hidden, weight, torch.tensor([0, 128, 130]))
    torch.testing.assert_close(got, torch.full((3,), -math.log(131)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bias_of_minus_infinity_forbids_a_token(dtype: torch.dtype) -> None:
    hidden, weight = torch.randn(2, 16).to(dtype), torch.randn(140, 16).to(dtype)
    bias = torch.zeros(140, dtype=dtype)
    bias[128:] = -math.inf  # a whole tile of them
    bias[3] = -math.inf
    got = check(hidden, weight, torch.tensor([3, 4]), bias)
    assert got[0] == -math.inf and got[1].isfinite()
    assert check(hidden, weight, torch.tensor([3, 4]), bias - math.inf).isnan().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_in_a_hidden_state_make_their_row_nan_and_no_other(bad: float) -> None:
    hidden, weight, tokens = torch.randn(3, 16), torch.randn(140, 16), torch.tensor([0, 1, 139])
    clean = check(hidden, weight, tokens)
    hidden[1, 7] = bad
    got = check(hidden, weight, tokens)
    assert got[1].isnan()
    assert torch.equal(got[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("place", [0, 127, 128, 139])
def test_nan_and_infinity_in_a_logit_reach_the_result(place: int) -> None:
    hidden, weight, bias = torch.randn(2, 16), torch.randn(140, 16), torch.zeros(140)
    for bad in (math.nan, math.inf):
        bias[place] = bad
        assert check(hidden, weight, torch.tensor([5, 139]), bias).isnan().all()


def test_a_token_that_is_no_id_has_no_log_prob() -> None:
    tokens = torch.tensor([-1, 130, 131, 2**40]).to(DEVICE)
    got = linear_logprob(
        torch.randn(4, 16).to(DEVICE), torch.randn(140, 16).to(DEVICE), tokens, vocab_size=131
    )
    assert got.isnan().tolist() == [True, False, True, True]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab_size", "softcap"), [(5, None, None), (18, 131, 9.0)])
def test_its_first_half_merges_to_the_same_bits(
    rows: int, vocab_size: int | None, softcap: float | None, dtype: torch.dtype
) -> None:
    arguments = (
        torch.randn(rows, 40).to(dtype).to(DEVICE), torch.randn(300, 40).to(dtype).to(DEVICE),
        torch.tensor([-1, 130, 131, *range(rows - 3)]).to(DEVICE), None, softcap, 0.5, vocab_size,
    )  # fmt: skip
    with products_in_order():
        halves = linear_logprob_partials(*arguments)
        whole = linear_logprob(*arguments)
    tile = 64 if dtype == torch.float32 else 128
    assert halves.largest.shape == halves.total.shape == (rows, -(-(vocab_size or 300) // tile))
    assert halves.largest.isfinite().all()
    assert halves.target.isnan().tolist()[:3] == [True, False, vocab_size is not None]
    assert torch.equal(halves.logprobs().nan_to_num(1), whole.nan_to_num(1))


def test_the_first_half_of_a_product_that_torch_does_is_one_split() -> None:
    arguments = torch.randn(40, 16).to(DEVICE), torch.randn(300, 16).to(DEVICE)
    tokens = torch.arange(40).to(DEVICE)
    assert not module.is_fused(*arguments)
    halves = linear_logprob_partials(*arguments, tokens)
    assert halves.largest.shape == (40, 1)
    assert torch.equal(halves.logprobs(), linear_logprob(*arguments, tokens))


@pytest.mark.parametrize("rows", [0, 5, 40])
def test_shapes_of_the_first_half_are_known_without_it(rows: int) -> None:
    hidden, weight = torch.randn(rows, 16).to(DEVICE), torch.randn(300, 16).to(DEVICE)
    arguments = (hidden, weight, torch.zeros(rows).long().to(DEVICE), None, None, 1.0, 290)
    checks = ("test_schema", "test_faketensor")
    operator = torch.ops.w2s_fast.linear_logprob_partials.default
    torch.library.opcheck(operator, arguments, test_utils=checks)


def test_rows_may_lie_anywhere() -> None:
    hidden, weight, tokens = torch.randn(3, 30), torch.randn(140, 30), torch.tensor([0, 1, 139])
    expected = check(hidden, weight, tokens)
    store = torch.full((7, 60), math.nan)
    store[1:7:2, 5:35] = hidden
    heads = torch.full((280, 40), math.nan)
    heads[::2, 3:33] = weight
    assert torch.equal(check(store[1:7:2, 5:35], heads[::2, 3:33], tokens), expected)
    columns = hidden.T.contiguous().T, weight.T.contiguous().T
    assert torch.equal(check(*columns, tokens), expected)


def test_a_head_of_doubles_and_no_rows_go_the_plain_way() -> None:
    hidden, weight = torch.randn(2, 8, device=DEVICE).double(), torch.randn(9, 8, device=DEVICE)
    tokens = torch.tensor([1, 2], device=DEVICE)
    got = linear_logprob(hidden, weight.double(), tokens)
    exact = (hidden @ weight.double().T).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(got.double(), exact)
    assert linear_logprob(hidden[:0].float(), weight, tokens[:0]).shape == (0,)
