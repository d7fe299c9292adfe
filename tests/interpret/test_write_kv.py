"""The kernel of write_kv writes the same bits as the definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.interpret.rule import DEVICE, DTYPES, compiled_for
from tests.kernels.test_write_kv import same, some_pages, written
from tests.support.drawn import drawn
from w2s_fast.kernels import write_kv as module
from w2s_fast.kernels.write_kv import write_kv


def check(k: Tensor, v: Tensor, pages: Tensor, slots: Tensor) -> None:
    expected = written(k, v, pages, slots)
    pages = pages.to(DEVICE)
    write_kv(k.to(DEVICE), v.to(DEVICE), pages, slots.to(DEVICE))
    assert same(pages.cpu(), expected)


@drawn(25)
@given(
    tokens=st.integers(0, 9),
    heads=compiled_for([1, 2, 3, 4, 5], 3),
    dim=compiled_for([1, 8, 16, 80], 80),
    page_size=compiled_for([1, 3, 16, 48], 3),
    skipped=st.sampled_from([0.0, 0.3, 1.0]),
    dtype=compiled_for(DTYPES, torch.float32),
    pages_dtype=compiled_for(DTYPES, torch.float16),
    seed=st.integers(0, 2**16),
)
def test_every_token_lies_where_its_slot_says(
    tokens: int,
    heads: int,
    dim: int,
    page_size: int,
    skipped: float,
    dtype: torch.dtype,
    pages_dtype: torch.dtype,
    seed: int,
) -> None:
    draw = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, tokens, heads, dim, generator=draw).to(dtype)
    slots = torch.randperm(10 * page_size, generator=draw)[:tokens]
    slots[torch.rand(tokens, generator=draw) < skipped] = -1
    check(k, v, some_pages(10, page_size, heads, dim, pages_dtype), slots)


@pytest.mark.parametrize(("heads", "dim"), [(40, 64), (9, 256), (2, 4096)])
def test_many_heads_take_several_programs(heads: int, dim: int) -> None:
    k, v = torch.randn(2, 3, heads, dim)
    check(k, v, some_pages(2, 4, heads, dim, torch.float32), torch.tensor([5, 0, 3]))


def test_keys_may_lie_at_any_stride() -> None:
    pages = some_pages(2, 4, 2, 8, torch.float32)
    heads_first = torch.randn(2, 5, 8).transpose(0, 1)
    check(heads_first, torch.randn(5, 2, 16)[..., ::2], pages, torch.arange(5))
    check(torch.randn(5, 1, 8).expand(-1, 2, -1), heads_first, pages, torch.arange(5))


def test_the_operator_is_served_by_the_kernel() -> None:
    k, v = torch.randn(2, 3, 2, 8).to(DEVICE)
    pages = some_pages(1, 4, 2, 8, torch.float32).to(DEVICE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_torch", None)
        write_kv(k, v, pages, torch.arange(3, device=DEVICE))
    assert pages[:, 0, :3].isfinite().all()
