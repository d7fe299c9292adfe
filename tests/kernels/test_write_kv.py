"""write_kv puts each token's keys and values where its slot says, and touches nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from w2s_fast.kernels.write_kv import write_kv


def written(k: Tensor, v: Tensor, pages: Tensor, slots: Tensor) -> Tensor:
    """The definition, one token at a time, on a copy of the pages."""
    pages = pages.clone()
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            page, offset = divmod(slot, pages.shape[2])
            pages[0, page, offset] = k[token].to(pages.dtype)
            pages[1, page, offset] = v[token].to(pages.dtype)
    return pages


def some_pages(pages: int, page_size: int, heads: int, dim: int, dtype: torch.dtype) -> Tensor:
    """One layer in the middle of a pool of three, of garbage."""
    return torch.full((3, 2, pages, page_size, heads, dim), math.nan, dtype=dtype)[1]


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("page_size", [1, 5, 16])
@pytest.mark.parametrize("heads", [1, 3])
def test_every_token_lies_where_its_slot_says(
    heads: int, page_size: int, dtype: torch.dtype
) -> None:
    k, v = torch.randn(2, 9, heads, 8)
    slots = torch.randperm(11 * page_size)[:9]
    pages = some_pages(11, page_size, heads, 8, dtype)
    expected = written(k, v, pages, slots)
    write_kv(k, v, pages, slots)
    assert same(pages, expected)


def test_tokens_of_negative_slots_are_left_out() -> None:
    k, v = torch.randn(2, 4, 2, 8)
    slots = torch.tensor([-1, 7, -100, 0])
    pages = some_pages(2, 4, 2, 8, torch.float32)
    expected = written(k, v, pages, slots)
    write_kv(k, v, pages, slots)
    assert same(pages, expected)
    assert pages.isfinite().sum() == 2 * 2 * 2 * 8


def test_other_layers_stay_as_they_are() -> None:
    pool = torch.full((3, 2, 2, 4, 2, 8), math.nan)
    write_kv(*torch.randn(2, 4, 2, 8), pool[1], torch.arange(4))
    assert pool[[0, 2]].isnan().all() and pool[1, :, 0].isfinite().all()


def test_keys_may_lie_at_any_stride() -> None:
    k = torch.randn(2, 5, 8).transpose(0, 1)  # as a model lays them out: heads first
    v = torch.randn(5, 2, 16)[..., ::2]
    pages = some_pages(2, 4, 2, 8, torch.float32)
    expected = written(k, v, pages, torch.arange(5))
    write_kv(k, v, pages, torch.arange(5))
    assert same(pages, expected)


def test_no_tokens_write_nothing() -> None:
    pages = some_pages(2, 4, 2, 8, torch.float32)
    write_kv(torch.randn(0, 2, 8), torch.randn(0, 2, 8), pages, torch.zeros(0, dtype=torch.int64))
    assert pages.isnan().all()


@pytest.mark.parametrize(
    ("k", "v", "pages", "slots"),
    [
        ((3, 2, 8), (3, 2, 8), (2, 4, 4, 2, 8), (4,)),
        ((3, 2, 8), (3, 1, 8), (2, 4, 4, 2, 8), (3,)),
        ((3, 2, 4), (3, 2, 4), (2, 4, 4, 2, 8), (3,)),
        ((3, 2, 8), (3, 2, 8), (3, 4, 4, 2, 8), (3,)),
        ((3, 2, 8), (3, 2, 8), (2, 16, 2, 8), (3,)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    k: tuple[int, ...], v: tuple[int, ...], pages: tuple[int, ...], slots: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="must be"):
        write_kv(
            torch.zeros(k), torch.zeros(v), torch.zeros(pages),
            torch.zeros(slots, dtype=torch.int64),
        )  # fmt: skip


def test_pages_that_are_not_one_layer_are_refused() -> None:
    pages = torch.zeros(2, 4, 4, 2, 16)[..., ::2]
    with pytest.raises(ValueError, match="contiguous"):
        write_kv(*torch.zeros(2, 3, 2, 8), pages, torch.arange(3))
