"""The kernels of token_logprob give what float64 gives, however rows and vocabulary are cut."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.interpret.rule import (
    DEVICE,
    DTYPES,
    assert_as_exact_as_torch,
    compiled_for,
    exact_logprob,
)
from tests.support.drawn import drawn
from w2s_fast.kernels import token_logprob as module
from w2s_fast.kernels.library import Gpu
from w2s_fast.kernels.token_logprob import token_logprob

# Parts of 32.
SMALL = module._Launch(depth=2, lanes=8, vector=2, num_warps=1, programs_per_sm=1)


def check(
    logits: Tensor,
    tokens: Tensor,
    vocab_size: int | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    logits, tokens = logits.to(DEVICE), tokens.to(DEVICE)
    got = token_logprob(logits, tokens, vocab_size=vocab_size, scale=scale, softcap=softcap)
    assert got.dtype == torch.float32
    arguments = (logits, tokens, vocab_size, scale, softcap)
    plain, exact = module._torch(*arguments), exact_logprob(*arguments)
    assert_as_exact_as_torch(got, plain, exact, logits.dtype)
    return got.cpu()


def on(sms: int) -> AbstractContextManager[object]:
    """Small parts, shared by the programs of so many multiprocessors."""
    table = {"gpu": lambda _: Gpu(90, sms), "_launch": lambda *_: SMALL}
    return mock.patch.multiple(module, **table)


@drawn(60)
@given(
    rows=st.integers(1, 5),
    # Around one, two and three parts of 32.
    vocabulary=st.one_of(st.integers(1, 3), st.integers(30, 34), st.integers(62, 98)),
    padding=st.integers(0, 9),
    sms=st.sampled_from([1, 4, 6, 100]),
    dtype=compiled_for(DTYPES, torch.float32),
    scale=st.sampled_from([1.0, 0.125]),
    softcap=st.sampled_from([None, 5.0, 30.0]),
    forbidden=st.sampled_from([0.0, 0.5, 0.95]),
    seed=st.integers(0, 2**16),
)
def test_every_cut_of_a_row_gives_the_definition(
    rows: int,
    vocabulary: int,
    padding: int,
    sms: int,
    dtype: torch.dtype,
    scale: float,
    softcap: float | None,
    forbidden: float,
    seed: int,
) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary + padding, generator=draw) * 6
    tokens = torch.randint(vocabulary, (rows,), generator=draw)
    logits[torch.rand(logits.shape, generator=draw) < forbidden] = -math.inf
    # At least one token is allowed; elsewhere the padding would be read as NaN.
    logits[torch.arange(rows), torch.randint(vocabulary, (rows,), generator=draw)] = 1.0
    logits[:, vocabulary:] = math.nan
    with on(sms):
        check(logits.to(dtype), tokens, vocabulary, scale, softcap)


@pytest.mark.parametrize("sms", [1, 132])
@pytest.mark.parametrize("vocabulary", [4095, 4096, 8192, 8208])
def test_the_launch_table_gives_the_definition(vocabulary: int, sms: int) -> None:
    logits, tokens = torch.randn(2, vocabulary) * 4, torch.randint(vocabulary, (2,))
    with mock.patch.object(module, "gpu", return_value=Gpu(90, sms)):
        check(logits, tokens)
        check(logits.half(), tokens, vocabulary - 3, 0.5, 10.0)


def test_a_soft_cap_is_exact_where_its_two_formulas_meet() -> None:
    """tanh is a series below 0.3 and a quotient above: pairs of logits around it, and beyond."""
    middle = torch.linspace(-60, 60, 97)
    check(torch.stack([middle - 0.5, middle + 0.5], 1), torch.zeros(97).long(), softcap=100.0)


@pytest.mark.parametrize("sms", [1, 100])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_rows_of_equal_logits_are_uniform(sms: int, softcap: float | None) -> None:
    with on(sms):
        for level in (0.0, 1e4, -1e4, 3e38, -3e38):
            got = check(torch.full((2, 77), level), torch.tensor([0, 76]), softcap=softcap)
            torch.testing.assert_close(got, torch.full((2,), -math.log(77)))


@pytest.mark.parametrize("sms", [1, 100])
@pytest.mark.parametrize("place", [0, 1, 31, 32, 40, 63, 64, 70])
def test_nan_and_infinity_anywhere_make_their_row_nan_and_no_other(sms: int, place: int) -> None:
    logits, tokens = torch.randn(5, 71), torch.tensor([3, 3, 70, 0, 1])
    with on(sms):
        clean = check(logits, tokens)
        logits[1, place] = math.nan
        logits[2, place] = math.inf
        logits[3] = -math.inf
        got = check(logits, tokens)
    assert got[1:4].isnan().all()
    assert torch.equal(got[[0, 4]], clean[[0, 4]])


@pytest.mark.parametrize("sms", [1, 100])
def test_a_forbidden_token_has_log_prob_minus_infinity(sms: int) -> None:
    logits = torch.randn(1, 71)
    logits[0, 66] = -math.inf
    with on(sms):
        assert check(logits, torch.tensor([66]))[0] == -math.inf


@pytest.mark.parametrize("sms", [1, 100])
def test_a_token_that_is_no_id_has_no_log_prob(sms: int) -> None:
    tokens = torch.tensor([-1, 40, 41, 2**40])
    with on(sms):
        got = token_logprob(torch.randn(4, 50).to(DEVICE), tokens.to(DEVICE), vocab_size=41).cpu()
    assert got.isnan().tolist() == [True, False, True, True]


@pytest.mark.parametrize("sms", [1, 100])
def test_rows_may_lie_anywhere(sms: int) -> None:
    store = torch.full((7, 103), math.nan)
    tokens = torch.tensor([0, 44, 89])
    logits = torch.randn(3, 90)
    with on(sms):
        expected = check(logits, tokens)
        store[1:7:2, 5:95] = logits
        assert torch.equal(check(store[1:7:2, 5:95], tokens), expected)
        assert torch.equal(check(logits.T.contiguous().T, tokens), expected)
        check(logits[:1].expand(3, -1), tokens)


@pytest.mark.parametrize("sms", [1, 132])
def test_equal_rows_give_equal_bits(sms: int) -> None:
    with on(sms):
        got = check((torch.randn(71) * 6).expand(9, -1).contiguous(), torch.full((9,), 40))
    assert torch.equal(got, got[:1].expand(9))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_row_has_the_same_bits_whoever_takes_its_parts(
    dtype: torch.dtype, softcap: float | None
) -> None:
    """From a program for each of eleven parts to one for all of them."""
    logits, tokens = (torch.randn(8, 331) * 2).to(dtype), torch.arange(8) * 47
    found = []
    for sms in (88, 40, 16, 1):
        with on(sms):
            found.append(check(logits, tokens, softcap=softcap))
    assert all(torch.equal(got, found[0]) for got in found)


def test_one_launch_is_enough_where_rows_fill_the_device() -> None:
    refused = mock.Mock(side_effect=AssertionError("a second launch"))
    with mock.patch.object(module, "_merge_parts", refused), on(sms=3):
        check(torch.randn(3, 331), torch.tensor([1, 2, 3]))
        with pytest.raises(TypeError, match="not subscriptable"):
            check(torch.randn(1, 331), torch.tensor([1]))


def test_no_rows_launch_nothing() -> None:
    got = token_logprob(torch.randn(0, 9).to(DEVICE), torch.zeros(0).long().to(DEVICE))
    assert got.shape == (0,)
