"""Every operator on the device, against float64, in every dtype and at full vocabularies.

An operator may be wrong by no more than the plain torch version plus 1e-5, 1e-3 or 1e-2 in
float32, float16 and bfloat16.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.beams import RoundOfOne, check
from w2s_fast.kernels.fuse_logits import fuse_logits
from w2s_fast.kernels.linear_logprob import linear_logprob
from w2s_fast.kernels.sample_tokens import sample_tokens
from w2s_fast.kernels.token_logprob import token_logprob

DTYPES = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
VOCABULARIES = [1, 17, 50_257, 128_256]


def worst(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("rows", [1, 16, 200])
def test_token_logprob_is_as_exact_as_torch(dtype: torch.dtype, vocab: int, rows: int) -> None:
    logits = (torch.randn(rows, vocab, device="cuda") * 5).to(dtype)
    tokens = torch.randint(0, vocab, (rows,), device="cuda")
    exact = logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    plain = logits.float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    assert worst(token_logprob(logits, tokens), exact) <= worst(plain, exact) + DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocab", "width"), [(17, 32), (50_257, 768), (128_256, 4_096)])
@pytest.mark.parametrize("rows", [1, 16, 100, 300])
def test_linear_logprob_is_as_exact_as_torch(
    dtype: torch.dtype, vocab: int, width: int, rows: int
) -> None:
    hidden = torch.randn(rows, width, device="cuda").to(dtype)
    weight = (torch.randn(vocab, width, device="cuda") * 3 * width**-0.5).to(dtype)
    tokens = torch.randint(0, vocab, (rows,), device="cuda")
    chunks = [hidden[i : i + 16].double() @ weight.double().T for i in range(0, rows, 16)]
    exact = torch.cat([c.log_softmax(-1) for c in chunks]).gather(1, tokens[:, None])[:, 0]
    plain = (hidden @ weight.T).float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    found = linear_logprob(hidden, weight, tokens)
    assert worst(found, exact) <= worst(plain, exact) + DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_sample_tokens_draws_what_the_cpu_draws(dtype: torch.dtype, vocab: int) -> None:
    rows = 256
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(rows, vocab, generator=generator) * 4).to(dtype)
    row = torch.arange(rows)
    settings = (
        torch.tensor([0.0, 0.3, 0.7, 1.0, 1.5])[row % 5],
        torch.tensor([0, 1, 50, 1000])[row % 4],
        torch.tensor([1.0, 0.95, 0.3], dtype=torch.float64)[row % 3],
        torch.tensor([0.0, 0.05], dtype=torch.float64)[row % 2],
        row * 2**33,
        row % 16,
        row // 16,
    )
    on_cpu, logprobs = sample_tokens(logits, *settings)
    on_gpu, found = sample_tokens(logits.cuda(), *(s.cuda() for s in settings))
    # The two exponential functions differ in their last bit, which may move one draw in a million.
    assert int((on_cpu != on_gpu.cpu()).sum()) <= 1
    same = on_cpu == on_gpu.cpu()
    assert torch.allclose(logprobs[same], found.cpu()[same], atol=1e-4)


@pytest.mark.parametrize("candidates", [2, 16, 100, 1000])
def test_select_beams_agrees_with_the_naive_selection(candidates: int) -> None:
    generator = torch.Generator().manual_seed(candidates)
    tuned, untuned = -torch.rand(2, candidates, 3, generator=generator).double()
    chunks = torch.randint(0, 3, (candidates, 3), generator=generator).tolist()
    r = RoundOfOne(
        chunks=[tuple(c) for c in chunks],
        siblings=[c % 3 for c in range(candidates)],
        previous=[0.5 * (c % 2) for c in range(candidates)],
        before=[2] * candidates,
        parents=list(range(candidates)),
        tuned=[tuned.float().tolist()],
        untuned=[untuned.float().tolist()],
        width=4,
        mean=False,
        dedup=True,
    )
    check([r], [1.0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_fuse_logits_is_as_exact_as_torch(dtype: torch.dtype) -> None:
    base, tuned, untuned = (torch.randn(64, 50_257, device="cuda").to(dtype) for _ in range(3))
    beta = torch.rand(1, 64, device="cuda")
    exact = base.double() + beta[0, :, None].double() * (tuned.double() - untuned.double())
    plain = base.float() + beta[0, :, None] * (tuned.float() - untuned.float())
    found = fuse_logits(base, tuned[None], untuned[None], beta)
    assert worst(found, exact) <= worst(plain, exact) + DTYPES[dtype]
