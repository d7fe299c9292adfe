"""paged_attention is attention over the keys that the tables point to, and over nothing else."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from w2s_fast.kernels import paged_attention_triton as table
from w2s_fast.kernels.library import Gpu
from w2s_fast.kernels.paged_attention import SharedSegments, paged_attention

NAN = math.nan


class Case(NamedTuple):
    """The tensors of one call, and its bounds."""

    q: Tensor
    pages: Tensor
    page_table: Tensor
    lengths: Tensor
    cu_seqlens_q: Tensor
    max_q: int
    max_k: int

    def tensors(self) -> tuple[Tensor, ...]:
        return self[:5]

    def bounds(self) -> dict[str, int]:
        return {"max_q": self.max_q, "max_k": self.max_k}

    def to(self, device: str) -> Case:
        return Case(*(x.to(device) for x in self.tensors()), self.max_q, self.max_k)

    def row(self, index: int) -> Case:
        """One row alone, under the same bounds."""
        a, b = self.cu_seqlens_q[index : index + 2].tolist()
        return Case(
            self.q[a:b], self.pages, self.page_table[index : index + 1],
            self.lengths[index : index + 1], torch.tensor([0, b - a], dtype=torch.int32),
            self.max_q, self.max_k,
        )  # fmt: skip


def make_case(
    rows: list[tuple[int, int]],
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 16,
    page_size: int = 16,
    shared: int = 0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    slack: int = 0,
) -> Case:
    """Rows of (new tokens, keys with them) in pages strewn over a pool of NaN.

    Args:
        shared: the first pages of every row, as many of them as it fills, are the same for all.
        slack: added to the bounds.
    """
    draw = torch.Generator().manual_seed(seed)
    held = [-(-length // page_size) for _, length in rows]
    free = torch.randperm(sum(held) + shared + 2, generator=draw).tolist()
    table = torch.full((len(rows), max(held, default=0) + 1), -1, dtype=torch.int32)
    pages = torch.full((3, 2, len(free), page_size, kv_heads, dim), NAN, dtype=dtype)[1]
    trunk = [free.pop() for _ in range(shared)]
    for page in trunk:
        pages[:, page] = torch.randn(2, page_size, kv_heads, dim, generator=draw).to(dtype)
    for row, (_, length) in enumerate(rows):
        for index in range(held[row]):
            filled = min(page_size, length - index * page_size)
            if index < shared and filled == page_size:
                table[row, index] = trunk[index]
                continue
            table[row, index] = page = free.pop()
            new = torch.randn(2, filled, kv_heads, dim, generator=draw).to(dtype)
            pages[:, page, :filled] = new
    counts = torch.tensor([0] + [new for new, _ in rows])
    q = torch.randn(int(counts.sum()), heads, dim, generator=draw).to(dtype)
    return Case(
        q, pages, table, torch.tensor([length for _, length in rows], dtype=torch.int32),
        counts.cumsum(0).int(), max((n for n, _ in rows), default=0) + slack,
        max((length for _, length in rows), default=0) + slack,
    )  # fmt: skip


def exact(
    case: Case,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The definition in float64: one query and one head at a time."""
    q, pages = case.q.double(), case.pages.double()
    page_size, kv_heads = pages.shape[2:4]
    group = q.shape[1] // kv_heads
    out = torch.zeros_like(q)
    for row, length in enumerate(case.lengths.tolist()):
        first, last = case.cu_seqlens_q[row : row + 2].tolist()
        for token in range(first, last):
            position = length - (last - token)
            begin = 0 if window is None else max(0, position - window + 1)
            seen = range(begin, position + 1)
            where = [(int(case.page_table[row, t // page_size]), t % page_size) for t in seen]
            if not where:
                continue
            for head in range(q.shape[1]):
                k, v = (
                    torch.stack([pages[i, page, at, head // group] for page, at in where])
                    for i in (0, 1)
                )
                x = scale * (k @ q[token, head])
                if softcap is not None:
                    x = softcap * torch.tanh(x / softcap)
                if sinks is not None:
                    x = torch.cat([x, sinks[head : head + 1].double()])
                out[token, head] = x.softmax(0)[: len(v)] @ v
    return out


def check(case: Case, **rule: Any) -> Tensor:
    got = paged_attention(*case.tensors(), **rule, **case.bounds())
    assert got.dtype == case.q.dtype and got.is_contiguous()
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}.get(case.q.dtype, 2e-2)
    torch.testing.assert_close(got.double(), exact(case, **rule), atol=tolerance, rtol=tolerance)
    return got


MIXED = [(1, 33), (3, 3), (0, 20), (5, 16), (1, 1), (2, 49), (0, 0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("page_size", [1, 5, 16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (5, 1)])
def test_it_equals_the_definition(
    heads: int, kv_heads: int, page_size: int, dtype: torch.dtype
) -> None:
    check(make_case(MIXED, heads, kv_heads, page_size=page_size, dtype=dtype), scale=0.25)


@pytest.mark.parametrize("window", [None, 1, 7, 16, 1000])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_windows_soft_caps_and_sinks(
    with_sinks: bool, softcap: float | None, window: int | None
) -> None:
    sinks = torch.randn(4) * 2 if with_sinks else None
    check(make_case(MIXED), scale=0.5, window=window, softcap=softcap, sinks=sinks)


@pytest.mark.parametrize("dim", [8, 64, 80, 96, 128, 256])
def test_head_sizes(dim: int) -> None:
    check(make_case([(1, 20), (3, 17)], dim=dim), scale=dim**-0.5)


def test_rows_may_share_pages() -> None:
    case = make_case([(1, 40), (1, 37), (2, 33), (1, 20)], shared=2)
    assert case.page_table[:3, :2].unique(dim=0).shape == (1, 2)
    check(case, scale=0.25)


def test_bounds_may_be_loose() -> None:
    case = make_case(MIXED)
    loose = make_case(MIXED, slack=30)
    torch.testing.assert_close(check(case, scale=0.25), check(loose, scale=0.25))


def test_queries_may_lie_at_any_stride() -> None:
    case = make_case(MIXED)
    expected = check(case, scale=0.25)
    heads_first = case.q.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(check(case._replace(q=heads_first), scale=0.25), expected)
    strided = case.q.repeat_interleave(2, dim=-1)[..., ::2]
    torch.testing.assert_close(check(case._replace(q=strided), scale=0.25), expected)
    wide_table = case.page_table.repeat_interleave(2, dim=-1)[:, ::2]
    torch.testing.assert_close(check(case._replace(page_table=wide_table), scale=0.25), expected)


def test_a_query_that_sees_no_key_gives_zero() -> None:
    case = make_case([(1, 5), (1, 9)])
    case.lengths[1] = 0
    case.page_table[1] = -1
    assert (check(case, scale=0.25)[1] == 0).all()
    assert (check(case, scale=0.25, sinks=torch.zeros(4))[1] == 0).all()


def test_tokens_of_no_row_disturb_nobody() -> None:
    case = make_case([(1, 5), (2, 9)])
    padded = case._replace(q=torch.cat([case.q, torch.full((4, 4, 16), NAN)]))
    got = paged_attention(*padded.tensors(), scale=0.25, **case.bounds())
    assert got.shape == (7, 4, 16)
    torch.testing.assert_close(got[:3], check(case, scale=0.25))


@pytest.mark.parametrize("rows", [[], [(0, 0)], [(0, 7), (0, 30)]])
def test_no_queries_give_nothing(rows: list[tuple[int, int]]) -> None:
    assert check(make_case(rows), scale=0.25).shape == (0, 4, 16)


def refused(case: Case, match: str, **rule: Any) -> None:
    with pytest.raises(ValueError, match=match):
        paged_attention(*case.tensors(), scale=1.0, **rule, **case.bounds())


def test_arguments_that_do_not_fit_are_refused() -> None:
    case = make_case([(1, 5), (2, 9)])
    refused(case._replace(q=case.q[:, :3]), "multiple of its heads")
    refused(case._replace(q=case.q[..., :8]), "with the D of pages")
    refused(case._replace(q=case.q.double()), "must be the same")
    refused(case._replace(pages=case.pages[:1]), "must be")
    refused(case._replace(pages=case.pages.mT), "contiguous")
    refused(case._replace(lengths=case.lengths[:1]), r"\[S, M\], \[S\] and \[S \+ 1\]")
    refused(case._replace(cu_seqlens_q=case.cu_seqlens_q[1:]), r"\[S, M\], \[S\] and \[S \+ 1\]")
    starts = torch.zeros(2, dtype=torch.int32)
    refused(case, r"must be \[P\], \[S\] and \[S \+ 1\]", table_start=starts)
    ragged = case._replace(page_table=case.page_table.flatten())
    refused(ragged, r"must be \[S, M\]")
    refused(ragged, r"table_start \(1,\) must be \[S\] = \[2\]", table_start=starts[:1])
    refused(ragged._replace(lengths=starts[0]), r"must be \[P\], \[S\]", table_start=starts)
    refused(ragged._replace(lengths=starts[:1]), r"must be \[P\], \[S\]", table_start=starts)
    refused(case, r"must be \[H\]", sinks=torch.zeros(3))
    refused(case, "window is 0", window=0)
    ints = torch.zeros(2, dtype=torch.int32)
    shared = SharedSegments(ints, ints, torch.zeros(3).int(), torch.zeros(1, 6).int(), 0, 0, 9)
    paged_attention(*case.tensors(), scale=1.0, shared=shared, **case.bounds())
    for field, wrong in (
        ("own", ints[:1]), ("parts", ints[:1]), ("token_rows", ints),
        ("splits", torch.zeros(1, 5).int()), ("splits", ints),
    ):  # fmt: skip
        refused(case, r"must be \[S\], \[S\], \[T\]", shared=shared._replace(**{field: wrong}))


@pytest.mark.parametrize("arch", [80, 86, 90, 100, 120])
@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("dim", [16, 64, 128, 256])
def test_the_order_of_a_rows_sums_does_not_depend_on_the_other_rows(
    dim: int, element_size: int, arch: int
) -> None:
    """Nothing but the tiles depends on them, and a tile only decides who is computed together."""
    launches = [
        table._launch(Gpu(arch, 100), items, shared_items, group, dim, element_size)
        for items in (1, 4, 16, 17, 33, 65, 1000)
        for shared_items in (0, 16, 64, 1000)
        for group in (1, 4)
    ]
    assert len({launch.keys for launch in launches}) == 1
    assert table.SPLIT_KEYS % launches[0].keys == 0
    if element_size == 4:  # no exact product takes other tiles: float32 gives the same bits
        assert len(set(launches)) == 1
