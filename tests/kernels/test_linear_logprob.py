"""linear_logprob equals the LM head, a log-softmax and a gather, however it blocks the rows."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from w2s_fast.kernels import linear_logprob as module
from w2s_fast.kernels.linear_logprob import linear_logprob
from w2s_fast.kernels.linear_logprob_partials import linear_logprob_partials
from w2s_fast.kernels.token_logprob import token_logprob


def reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    tokens: torch.Tensor,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    vocab_size: int | None = None,
) -> torch.Tensor:
    logits = hidden.double() @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    logits = logits[:, :vocab_size] * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1)[torch.arange(len(tokens)), tokens]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("vocab_size", [None, 90])
def test_it_equals_the_whole_product(
    bias: bool, softcap: float | None, vocab_size: int | None
) -> None:
    hidden, weight = torch.randn(50, 24), torch.randn(101, 24)
    b = torch.randn(101) if bias else None
    tokens = torch.randint(vocab_size or 101, (50,))
    arguments = (hidden, weight, tokens, b, softcap, 0.5, vocab_size)
    got = linear_logprob(*arguments)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), reference(*arguments), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 7, 50, 51])
def test_blocks_change_nothing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, bias = torch.randn(50, 24), torch.randn(101, 24), torch.randn(101)
    tokens = torch.randint(101, (50,))
    whole = linear_logprob(hidden, weight, tokens, bias)
    monkeypatch.setattr(module, "_BLOCK_BYTES", rows * 4 * 101)
    blocked = linear_logprob(hidden, weight, tokens, bias)
    assert blocked.shape == (50,)
    torch.testing.assert_close(blocked, whole, atol=1e-5, rtol=1e-5)


def test_a_vocabulary_larger_than_a_block_goes_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", 16)
    hidden, weight, tokens = torch.randn(3, 8), torch.randn(64, 8), torch.tensor([0, 63, 5])
    torch.testing.assert_close(
        linear_logprob(hidden, weight, tokens).double(),
        reference(hidden, weight, tokens),
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_head_computes_in_its_own_type_and_the_softmax_in_float32(dtype: torch.dtype) -> None:
    hidden, weight = torch.randn(20, 16).to(dtype), torch.randn(300, 16).to(dtype)
    tokens = torch.randint(300, (20,))
    got = linear_logprob(hidden, weight, tokens)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, token_logprob(linear(hidden, weight), tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [0, 1, 50])
def test_its_first_half_merges_to_the_same_bits(rows: int, dtype: torch.dtype) -> None:
    hidden, weight = torch.randn(rows, 24).to(dtype), torch.randn(101, 24).to(dtype)
    weight[3] = torch.nan if rows == 50 else 0
    tokens = torch.randint(90, (rows,))
    arguments = (hidden, weight, tokens, None, 5.0, 0.5, 90)
    halves = linear_logprob_partials(*arguments)
    assert halves.largest.shape == halves.total.shape == (rows, 1)
    assert torch.equal(halves.logprobs().nan_to_num(1), linear_logprob(*arguments).nan_to_num(1))


def test_no_rows_give_no_log_probs() -> None:
    got = linear_logprob(torch.randn(0, 8), torch.randn(30, 8), torch.zeros(0, dtype=torch.int64))
    assert got.shape == (0,)
    assert got.dtype == torch.float32


@pytest.mark.parametrize(
    ("hidden", "weight", "tokens", "bias"),
    [
        ((3, 4), (9, 5), (3,), None),
        ((3, 4), (9, 4), (2,), None),
        ((4,), (9, 4), (1,), None),
        ((3, 4), (9, 4), (3,), (8,)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    hidden: tuple[int, ...],
    weight: tuple[int, ...],
    tokens: tuple[int, ...],
    bias: tuple[int, ...] | None,
) -> None:
    for function in (linear_logprob, linear_logprob_partials):
        with pytest.raises(ValueError, match="must be"):
            function(
                torch.zeros(hidden),
                torch.zeros(weight),
                torch.zeros(tokens, dtype=torch.int64),
                None if bias is None else torch.zeros(bias),
            )


@pytest.mark.parametrize(
    ("rows", "width", "dtype", "fused"),
    [
        (16, 768, torch.bfloat16, True),
        (2048, 768, torch.bfloat16, True),
        (127, 4096, torch.float16, True),
        (128, 4096, torch.float16, False),
        (32, 768, torch.float32, True),
        (33, 768, torch.float32, False),
    ],
)
def test_a_fixed_table_says_where_the_product_is_left_to_torch(
    rows: int, width: int, dtype: torch.dtype, fused: bool
) -> None:
    assert module._product_pays(rows, width, dtype.itemsize) is not fused
