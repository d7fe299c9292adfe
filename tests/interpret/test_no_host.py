"""What the operators of a decoding step do around their kernels never waits for the device."""

from __future__ import annotations

import pytest
import torch

from tests.w2s_fast.test_no_host import NoHost
from w2s_fast.kernels import paged_attention, write_kv
from w2s_fast.kernels.sample_tokens_triton import launch


@pytest.mark.parametrize("top_k", [0, 3])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_sampling(top_k: int, top_p: float) -> None:
    rows = 3
    settings = (
        torch.tensor([0.7, 0.0, 1.3]),
        torch.full((rows,), top_k),
        torch.full((rows,), top_p, dtype=torch.float64),
        torch.zeros(rows, dtype=torch.float64),
        *torch.zeros(3, rows, dtype=torch.int64),
    )
    with NoHost():
        tokens, _ = launch(torch.randn(rows, 300), *settings)
    assert tokens.shape == (rows,)


@pytest.mark.parametrize("longest", [7, 600])  # one launch, and two
def test_attention_over_pages(longest: int) -> None:
    pages = torch.randn(2, 40, 16, 2, 16)
    table = torch.arange(2 * 38, dtype=torch.int32).view(2, 38) % 40
    lengths = torch.tensor([longest, 3], dtype=torch.int32)
    cu_seqlens_q = torch.tensor([0, 1, 2], dtype=torch.int32)
    with NoHost():
        write_kv._triton(torch.ones(2, 2, 16), torch.ones(2, 2, 16), pages, torch.tensor([5, -1]))
        out = paged_attention._triton(
            torch.randn(2, 4, 16), pages, table, lengths, cu_seqlens_q, 0.25, None, None, None,
            1, longest,
        )  # fmt: skip
    assert out.isfinite().all()
