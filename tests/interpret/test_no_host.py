"""What the operators of a decoding step do around their kernels never waits for the device."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from tests.interpret.rule import DEVICE
from tests.support.no_host import NoHost
from w2s_fast.attention.contract import LayerOptions
from w2s_fast.attention.kernel import KernelPlan
from w2s_fast.attention.row_tree import Level, RowTree
from w2s_fast.cache.pages import PagePool
from w2s_fast.kernels import paged_attention, write_kv
from w2s_fast.kernels.linear_logprob_partials import linear_logprob_partials
from w2s_fast.kernels.sample_tokens_triton import launch
from w2s_fast.kernels.score_select import score_select


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
    logits, *settings = (x.to(DEVICE) for x in (torch.randn(rows, 300), *settings))
    with NoHost():
        tokens, _ = launch(logits, *settings)
    assert tokens.shape == (rows,)


@pytest.mark.parametrize("prompt", [7, 600])
@pytest.mark.parametrize("shares", [True, False])
def test_attention_over_pages(prompt: int, shares: bool) -> None:
    pool = PagePool(1, 2, 16, 64, 16, 8, 1024, torch.float32, DEVICE)
    pool.kv.normal_()
    parent = pool.allocate(1)
    pool.reserve(parent, [prompt])
    pool.extend(parent, [prompt])
    slots = [*parent, *pool.fork(parent, [2])]
    pool.reserve(slots, [3, 3, 3])
    tree = RowTree.of([Level([0, 0, 0], [prompt] * 3)], 3) if shares else None
    plan = KernelPlan.make(pool, slots, [1, 1, 1], tree, ahead=2)
    assert (plan.shared is not None) == (shares and prompt == 600)
    q, new = torch.randn(3, 4, 16, device=DEVICE), torch.randn(3, 2, 16, device=DEVICE)
    with (
        mock.patch.object(paged_attention, "_operator", paged_attention._triton),
        mock.patch.object(write_kv, "_operator", write_kv._triton),
        NoHost(),
    ):
        for _ in range(2):
            out = plan.attend(0, q, new, new, LayerOptions(0.25, None, None, None))
            plan.advance()
    assert out.isfinite().all()


def test_scores_and_selection() -> None:
    ones, flags = torch.ones(4, dtype=torch.float64), torch.tensor([False, True])
    columns = (
        torch.arange(0, 9, 2), 0 * ones, torch.full((4,), 2), torch.zeros(4, dtype=torch.int32),
        torch.arange(4), torch.tensor([0, 2, 4]), torch.tensor([3, 5]), torch.tensor([0, 1, 2]),
        torch.tensor([1, 2]), flags, flags,
    )  # fmt: skip
    weights, *columns = (x.to(DEVICE) for x in (ones[:1], *columns))
    tokens, logprobs = torch.randint(90, (8,), device=DEVICE), -torch.rand(8, device=DEVICE)
    hidden, head = torch.randn(8, 16, device=DEVICE), torch.randn(90, 16, device=DEVICE)
    with NoHost():
        tuned, untuned = (linear_logprob_partials(x, head, tokens) for x in (hidden, -hidden))
        packed = score_select([(tuned, untuned)], weights, tokens, logprobs, *columns, 2, 2)
    assert packed.shape == (2 * 2 * 2 + 4 * 4 + 3 * 8,)
