"""token_logprob is a log-softmax in float32 and a gather, padding left out."""

from __future__ import annotations

import math

import pytest
import torch

from w2s_fast.kernels.token_logprob import token_logprob


def reference(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    vocab_size: int | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """The definition, in float64, one row at a time."""
    out = []
    for row, token in zip(logits.double(), tokens.tolist(), strict=True):
        values = [scale * x for x in row[:vocab_size].tolist()]
        if softcap is not None:
            values = [softcap * math.tanh(x / softcap) for x in values]
        top = max(values)
        out.append(values[token] - top - math.log(math.fsum(math.exp(x - top) for x in values)))
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("vocabulary", [1, 2, 31, 1000])
@pytest.mark.parametrize("softcap", [None, 3.0, 30.0])
@pytest.mark.parametrize("scale", [1.0, 0.125])
def test_it_equals_the_definition(vocabulary: int, softcap: float | None, scale: float) -> None:
    logits = torch.randn(9, vocabulary) * 8
    tokens = torch.randint(vocabulary, (9,))
    got = token_logprob(logits, tokens, scale=scale, softcap=softcap)
    assert got.dtype == torch.float32
    expected = reference(logits, tokens, scale=scale, softcap=softcap)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_sums_are_taken_in_float32_whatever_the_type_of_the_logits(dtype: torch.dtype) -> None:
    logits = (torch.randn(20, 5000) * 2 + 60).to(dtype)  # bfloat16 steps are 0.25 to 0.5 up here
    tokens = torch.randint(5000, (20,))
    got = token_logprob(logits, tokens)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), reference(logits, tokens), atol=2e-5, rtol=1e-6)


def test_padded_ids_take_no_part() -> None:
    logits = torch.randn(6, 40)
    tokens = torch.randint(33, (6,))
    padded = logits.clone()
    padded[:, 33:] = torch.tensor([1e4, math.nan, math.inf, 50.0, 0.0, 1.0, 2.0])
    expected = token_logprob(logits[:, :33], tokens)
    assert torch.equal(token_logprob(padded, tokens, vocab_size=33), expected)
    torch.testing.assert_close(expected.double(), reference(logits, tokens, vocab_size=33))


def test_a_forbidden_token_has_log_prob_minus_infinity_and_nan_stays_in_its_row() -> None:
    logits = torch.randn(4, 10)
    clean = token_logprob(logits, torch.tensor([1, 2, 3, 4]))
    logits[1, 2] = -math.inf
    logits[2, 7] = math.nan
    got = token_logprob(logits, torch.tensor([1, 2, 3, 4]))
    assert got[1] == -math.inf
    assert got[2].isnan()
    assert torch.equal(got[[0, 3]], clean[[0, 3]])


def test_an_infinite_logit_makes_its_row_nan_whichever_token_is_asked_for() -> None:
    logits = torch.randn(3, 10)
    logits[1, 4] = math.inf
    for token in (4, 5):
        got = token_logprob(logits, torch.full((3,), token))
        assert got.isnan().tolist() == [False, True, False]
    # A soft-cap makes it finite first.
    assert token_logprob(logits, torch.tensor([0, 0, 0]), softcap=3.0).isfinite().all()


def test_a_row_of_forbidden_tokens_is_nan() -> None:
    assert token_logprob(torch.full((1, 5), -math.inf), torch.tensor([2])).isnan()


@pytest.mark.parametrize(("logits", "tokens"), [((3, 5), (2,)), ((5,), (5,)), ((3, 5), (3, 1))])
def test_shapes_that_do_not_fit_are_refused(logits: tuple[int], tokens: tuple[int]) -> None:
    with pytest.raises(ValueError, match=r"must be \[N, V\] and \[N\]"):
        token_logprob(torch.zeros(logits), torch.zeros(tokens, dtype=torch.int64))


def test_log_probs_of_all_tokens_sum_to_one() -> None:
    row = torch.randn(200) * 5
    got = token_logprob(row.expand(200, -1), torch.arange(200))
    assert got.double().exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_no_rows_give_no_log_probs_and_the_logits_are_left_as_they_were() -> None:
    assert token_logprob(torch.randn(0, 5), torch.zeros(0, dtype=torch.int64)).shape == (0,)
    logits = torch.randn(3, 5)
    before = logits.clone()
    token_logprob(logits, torch.tensor([0, 1, 2]), scale=2.0, softcap=5.0)
    assert torch.equal(logits, before)
