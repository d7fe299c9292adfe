"""Attention of new tokens over paged keys and values: decoding and appending in one operator.

Keys and values stand in pages that rows may share, found through a table of pages (PagedAttention:
Kwon et al., arXiv 2309.06180). A program takes a tile of one row's queries for one head of keys
and walks over the keys block by block with an online softmax (FlashAttention-2: Dao, arXiv
2307.08691). The query heads of a key head lie beside the queries in the tile, so that keys are
read once for all of them and even one query fills a product.

A row of few queries and many keys is cut into segments that programs share; a second launch
merges their partials in order (split KV, as in flash-decoding: Dao, Haziza, Massa and Sizov). The
length of a segment is fixed and where it begins follows from the row alone, so that a row's
arithmetic does not depend on which other rows are in the launch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from w2s_fast.kernels.library import Gpu, constexpr, gpu, jit, register, tl, triton
from w2s_fast.kernels.logsumexp import LOWEST, soften

_SERVED = (torch.float16, torch.bfloat16, torch.float32)
_LARGEST_DIM = 256
# Rows of more new tokens than this are never cut: their queries alone are work for many programs.
_SPLIT_QUERIES = 16
# The kernels' logits are in units of log 2: exp2 is the instruction, exp is a product more.
_LOG2E = constexpr(1.4426950408889634)


def paged_attention(
    q: Tensor,
    pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    cu_seqlens_q: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    max_q: int,
    max_k: int,
) -> Tensor:
    """Causal attention of S rows, each with n new tokens, over all their keys.

    Query j of a row of n new tokens and ``length`` keys, new ones included, is at position
    i = length - n + j and sees the keys t with 0 <= t <= i and, in a window, i - t < window.
    With x_t = softcap * tanh(scale * q . k_t / softcap), or scale * q . k_t without a soft-cap,

        out = sum_t exp(x_t) v_t / (sum_t exp(x_t) + exp(sink of the head))

    where the sink's term is left out if there are no sinks. Sums are taken in float32. Query head
    h reads the keys of head h // (H / Hkv).

    Args:
        q: [T, H, D], the new tokens of all rows, one row after the other; any strides.
        pages: [2, P, page_size, Hkv, D], one layer of a pool, contiguous, same dtype; Hkv divides
            H. The new tokens' keys and values have been written. Positions that no row's length
            covers may hold anything, NaN included.
        page_table: int32 [S, M]; entry m of a row is the page of its keys m * page_size and on.
            Entries past a row's length are not used.
        lengths: int32 [S], the keys of each row.
        cu_seqlens_q: int32 [S + 1]; row s has the tokens cu_seqlens_q[s] : cu_seqlens_q[s + 1],
            which may be none.
        scale: factor on q . k. window: how many keys a query sees, its own included.
        softcap: None is off. sinks: [H] of any float dtype, one more logit for each head.
        max_q, max_k: bounds of the new tokens and the keys of a row. They are known to the host
            and choose the launch; data on the device is never read for it, so that a launch can
            be captured in a graph and replayed for other lengths within the bounds.

    Returns:
        [T, H, D] of q's dtype, contiguous. A query that sees no key gives 0. Tokens from
        cu_seqlens_q[S] on belong to no row: what comes out for them is not defined.
    """
    if pages.ndim != 5 or pages.shape[0] != 2 or not pages.is_contiguous():
        raise ValueError(
            f"pages {tuple(pages.shape)} must be [2, P, page_size, Hkv, D] and contiguous"
        )
    if q.ndim != 3 or q.shape[2] != pages.shape[4] or q.shape[1] % pages.shape[3] != 0:
        raise ValueError(
            f"q {tuple(q.shape)} must be [T, H, D] with the D of pages {tuple(pages.shape)} and a"
            " multiple of its heads"
        )
    if q.dtype != pages.dtype:
        raise ValueError(f"q is {q.dtype} and pages are {pages.dtype}: they must be the same")
    if (
        page_table.ndim != 2
        or lengths.shape != page_table.shape[:1]
        or cu_seqlens_q.shape != (len(page_table) + 1,)
    ):
        raise ValueError(
            f"page_table {tuple(page_table.shape)}, lengths {tuple(lengths.shape)} and"
            f" cu_seqlens_q {tuple(cu_seqlens_q.shape)} must be [S, M], [S] and [S + 1]"
        )
    if sinks is not None and sinks.shape != q.shape[1:2]:
        raise ValueError(f"sinks {tuple(sinks.shape)} must be [H] = [{q.shape[1]}]")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}: a query sees at least its own key")
    out: Tensor = _operator(
        q, pages, page_table, lengths, cu_seqlens_q, scale, window, softcap, sinks, max_q, max_k
    )
    return out


def _torch(
    q: Tensor,
    pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    cu_seqlens_q: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    max_q: int,
    max_k: int,
) -> Tensor:
    """All rows at once, padded to ``max_q`` queries and ``max_k`` keys."""
    tokens, heads, dim = q.shape
    rows = len(page_table)
    _, count, page_size, kv_heads, _ = pages.shape
    longest = min(max_k, page_table.shape[1] * page_size)
    if q.numel() == 0 or rows == 0 or longest == 0 or max_q == 0:
        return torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    group = heads // kv_heads
    j = torch.arange(max_q, device=q.device)
    t = torch.arange(longest, device=q.device)
    start, total = cu_seqlens_q.long(), lengths.long()[:, None]
    new = start.diff()[:, None]

    # Padding repeats another token or key; what comes of it is masked or not gathered below.
    written = t < total
    place = torch.where(written, t, 0)
    page = page_table.long().gather(1, place // page_size).clamp(0, count - 1)
    # Values are masked and not only weighted by 0: 0 * NaN is NaN.
    kv = pages.flatten(1, 2)[:, page * page_size + place % page_size]  # [2, S, L, Hkv, D]
    kv = kv.masked_fill(~written[:, :, None, None], 0)
    k, v = kv.transpose(2, 3).unbind()  # [S, Hkv, L, D]
    queries = q[(start[:-1, None] + j).clamp(max=tokens - 1)]  # [S, Q, H, D]
    queries = queries.view(rows, max_q, kv_heads, group, dim).permute(0, 2, 3, 1, 4)

    distance = (total - new + j)[:, :, None] - t  # [S, Q, L]
    seen = (distance >= 0) & written[:, None, :]
    if window is not None:
        seen &= distance < window
    x = queries.flatten(2, 3) @ k.mT
    x = x.to(torch.promote_types(q.dtype, torch.float32)).unflatten(2, (group, max_q)) * scale
    if softcap is not None:
        x = torch.tanh(x / softcap) * softcap
    x = x.masked_fill(~seen[:, None, None], -torch.inf)  # [S, Hkv, G, Q, L]
    if sinks is not None:
        sink = sinks.to(x.dtype).view(1, kv_heads, group, 1, 1)
        x = torch.cat([x, sink.expand(rows, -1, -1, max_q, -1)], dim=-1)
    weights = x.softmax(-1)[..., :longest]
    # Where a query sees nothing at all, the softmax is 0 / 0.
    weights = weights.masked_fill(~seen.any(-1)[:, None, None, :, None], 0).to(q.dtype)
    part = (weights.flatten(2, 3) @ v).unflatten(2, (group, max_q))
    part = part.permute(0, 3, 1, 2, 4).flatten(2, 3)  # [S, Q, H, D]

    token = torch.arange(tokens, device=q.device)
    row = torch.searchsorted(start[1:], token, right=True).clamp(max=rows - 1)
    out: Tensor = part[row, (token - start[row]).clamp(max=max_q - 1)]
    return out


def _fake(
    q: Tensor,
    pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    cu_seqlens_q: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    max_q: int,
    max_k: int,
) -> Tensor:
    return q.new_empty(q.shape)


class _Launch(NamedTuple):
    """A program multiplies [tile, D] queries with [keys, D] keys at a time."""

    tile: int  # queries times heads of a group
    keys: int
    segment: int  # keys that one program takes of a row that is cut; a multiple of ``keys``
    num_warps: int
    num_stages: int


def _launch(on: Gpu, queries: int, dim: int, element_size: int) -> _Launch:
    """Launch parameters: fixed by architecture, dtype and head size. Not measured on a GPU.

    ``queries`` are max_q times the heads of a group; ``dim`` is a power of two. ``keys`` and
    ``segment`` decide the order of a row's sums, so they must not depend on ``queries``, which
    other rows have a say in. A tile of 16 is the least that a product takes, one of 64 the least
    that fills a WGMMA. With two stages, keys are loaded between products; with three, during them.
    """
    if element_size == 4:  # no exact tensor-core product: small tiles, few registers
        return _Launch(tile=16, keys=32, segment=512, num_warps=8, num_stages=2)
    warp_groups = 90 <= on.arch < 120  # products of 64 rows by four warps at once
    largest = 64 if dim > 128 or (dim > 64 and not warp_groups) else 128
    tile = next((t for t in (16, 32, 64) if queries <= t), largest)
    widest = 128 if warp_groups else 64  # of 64 rows without a spill in four warps
    small = on.arch in (86, 89, 120)  # 99 KiB of shared memory
    return _Launch(
        tile,
        keys=32 if dim > 128 else 64,
        segment=512,
        num_warps=4 if tile <= 32 or (tile == 64 and dim <= widest) else 8,
        num_stages=2 if small and tile * dim > 4096 else 3,
    )


def _triton(
    q: Tensor,
    pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    cu_seqlens_q: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    max_q: int,
    max_k: int,
) -> Tensor:
    _, heads, dim = q.shape
    rows = len(page_table)
    if q.dtype not in _SERVED or dim > _LARGEST_DIM or q.numel() == 0 or rows * max_q == 0:
        return _torch(
            q, pages, page_table, lengths, cu_seqlens_q, scale, window, softcap, sinks,
            max_q, max_k,
        )  # fmt: skip
    if q.stride(2) != 1:
        q = q.contiguous()
    if page_table.stride(1) != 1:
        page_table = page_table.contiguous()
    lengths, cu_seqlens_q = lengths.contiguous(), cu_seqlens_q.contiguous()
    sinks = None if sinks is None else sinks.contiguous()
    page_size, kv_heads = pages.shape[2:4]
    group = heads // kv_heads
    padded = max(16, triton.next_power_of_2(dim))
    launch = _launch(gpu(q.device), max_q * group, padded, q.element_size())
    blocks = -(-max_q * group // launch.tile)
    # As many segments as the longest row that is cut may have.
    queries = min(max_q, _SPLIT_QUERIES)
    longest = max_k if window is None else min(max_k, window + queries + launch.keys - 2)
    splits = max(1, -(-longest // launch.segment))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    sums = peaks = out  # not used unless a row may be cut
    if splits > 1:
        cuts = (rows * queries, heads, splits)
        sums = torch.empty(*cuts, dim, dtype=torch.float32, device=q.device)
        peaks = torch.empty(*cuts, 2, dtype=torch.float32, device=q.device)
    both = {
        "DIM": dim, "LANES": padded, "WINDOW": window is not None,
        "SPLIT_QUERIES": _SPLIT_QUERIES, "KEYS": launch.keys, "SEGMENT": launch.segment,
    }  # fmt: skip
    _attend[(rows * blocks, kv_heads, splits)](
        q, pages, page_table, lengths, cu_seqlens_q, sinks, out, sums, peaks,
        q.stride(0), q.stride(1), pages.stride(0), page_table.stride(0), rows, blocks, splits,
        queries, window or 0, scale, softcap or 0.0, HEADS=kv_heads, GROUP=group,
        PAGE_SIZE=page_size, SOFTCAP=softcap is not None, SPLIT=splits > 1, TILE=launch.tile,
        **both, num_warps=launch.num_warps, num_stages=launch.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    if splits > 1:
        _merge_segments[(rows * queries, heads)](
            lengths, cu_seqlens_q, sinks, out, sums, peaks, splits, queries, window or 0,
            HEADS=heads, **both, num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip
    return out


@jit
def _segments(
    length, new, window,
    WINDOW: tl.constexpr, SPLIT_QUERIES: tl.constexpr, KEYS: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """Where a row's first segment begins, and how many it has: from the row alone."""
    origin = length * 0
    if WINDOW:
        origin = tl.maximum(length - new - window + 1, 0) // KEYS * KEYS
    count = tl.maximum(tl.cdiv(length - origin, SEGMENT), 1)
    return origin, tl.where(new > SPLIT_QUERIES, 1, count)


@jit
def _normalised(acc, m, s, sinks, head):
    """acc [N, LANES] over the sum s [N] of its weights, with the weight of the sink if any."""
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * _LOG2E
        top = tl.maximum(m, sink)
        s = s * tl.exp2(m - top) + tl.exp2(sink - top)
        acc = acc * tl.exp2(m - top)[:, None]
    return acc * (1.0 / tl.where(s == 0, 1.0, s))[:, None]  # nothing seen: 0


# Strides of q, and the size of the pages, are the model's; the rest varies from call to call.
@jit(
    do_not_specialize=[
        "page_table", "lengths", "cu_seqlens_q", "sinks", "sums", "peaks", "table_stride", "rows",
        "blocks", "splits", "queries", "window",
    ]
)  # fmt: skip
def _attend(
    q, pages, page_table, lengths, cu_seqlens_q, sinks, out, sums, peaks,
    q_token, q_head, values, table_stride, rows, blocks, splits, queries, window, scale, softcap,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, LANES: tl.constexpr,
    PAGE_SIZE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SPLIT: tl.constexpr,
    SPLIT_QUERIES: tl.constexpr, TILE: tl.constexpr, KEYS: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """Program (row and block of its queries, key head, segment).

    Rows vary fastest: siblings run side by side and find the pages they share in the cache. The
    last block of queries, which sees the most keys, begins first. Values lie ``values`` elements
    behind the keys.
    """
    row = tl.program_id(0) % rows
    first_item = (blocks - 1 - tl.program_id(0) // rows) * TILE
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    first_token = tl.load(cu_seqlens_q + row)
    new = tl.load(cu_seqlens_q + row + 1) - first_token
    if first_item >= new * GROUP:
        return
    length = tl.load(lengths + row)
    origin, segments = _segments(length, new, window, WINDOW, SPLIT_QUERIES, KEYS, SEGMENT)
    if split >= segments:
        return

    # Items of a tile: the heads of the first query, those of the next one, and so on.
    item = first_item + tl.arange(0, TILE)
    query = item // GROUP
    head = kv_head * GROUP + item % GROUP
    position = length - new + query
    real = query < new
    lane = tl.arange(0, LANES)
    token = (first_token + query).to(tl.int64)
    at = token[:, None] * q_token + head[:, None] * q_head + lane[None, :]
    asked = tl.load(q + at, mask=real[:, None] & (lane < DIM)[None, :], other=0.0)

    # Blocks begin at multiples of KEYS in every row and tile. Those that no query of the tile sees
    # would change no bit, and are left out.
    begin = origin
    if WINDOW:
        begin = tl.maximum(length - new + first_item // GROUP - window + 1, 0) // KEYS * KEYS
    end = length - new + tl.minimum(new, (first_item + TILE - 1) // GROUP + 1)
    if SPLIT:
        begin = tl.maximum(begin, origin + split * SEGMENT)
        end = tl.where(segments > 1, tl.minimum(end, origin + (split + 1) * SEGMENT), end)

    table = page_table + row.to(tl.int64) * table_stride
    keys = pages + kv_head * DIM
    m = tl.full([TILE], LOWEST, tl.float32)
    s = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, LANES], tl.float32)
    # The table is read a block ahead: a load that waits for another one of the same block would
    # take up every other stage of the pipeline.
    key = begin + tl.arange(0, KEYS)
    next_page = tl.load(table + key // PAGE_SIZE, mask=key < end, other=0)
    for start in range(begin, end, KEYS):
        key = start + tl.arange(0, KEYS)
        written = key < end  # what lies beyond may be NaN, which no weight of 0 would stop
        page = next_page.to(tl.int64)
        ahead = key + KEYS
        next_page = tl.load(table + ahead // PAGE_SIZE, mask=ahead < end, other=0)
        # Constants, so that the compiler sees how keys are aligned.
        slot = page * (PAGE_SIZE * HEADS * DIM) + (key % PAGE_SIZE) * (HEADS * DIM)
        known = written[:, None] & (lane < DIM)[None, :]
        k = tl.load(keys + slot[:, None] + lane[None, :], mask=known, other=0.0)
        x = tl.dot(asked, tl.trans(k), input_precision="ieee")
        x = soften(x, scale, softcap, SOFTCAP) * _LOG2E
        seen = key[None, :] <= position[:, None]
        if WINDOW:
            seen = seen & (position[:, None] - key[None, :] < window)
        x = tl.where(seen, x, -float("inf"))

        top = tl.maximum(m, tl.max(x, 1))
        weight = tl.exp2(x - top[:, None])
        fade = tl.exp2(m - top)
        s = s * fade + tl.sum(weight, 1)
        acc = acc * fade[:, None]
        v = tl.load(keys + values + slot[:, None] + lane[None, :], mask=known, other=0.0)
        acc = tl.dot(weight.to(v.dtype), v, acc, input_precision="ieee")
        m = top

    inside = real[:, None] & (lane < DIM)[None, :]
    if SPLIT and segments > 1:
        part = (row * queries + query).to(tl.int64) * (HEADS * GROUP) + head
        part = part * splits + split
        tl.store(sums + part[:, None] * DIM + lane[None, :], acc, mask=inside)
        tl.store(peaks + part * 2, m, mask=real)
        tl.store(peaks + part * 2 + 1, s, mask=real)
    else:
        acc = _normalised(acc, m, s, sinks, head)
        place = out + token[:, None] * (HEADS * GROUP * DIM) + head[:, None] * DIM + lane[None, :]
        tl.store(place, acc.to(out.dtype.element_ty), mask=inside)


@jit(
    do_not_specialize=[
        "lengths", "cu_seqlens_q", "sinks", "sums", "peaks", "splits", "queries", "window",
    ]
)  # fmt: skip
def _merge_segments(
    lengths, cu_seqlens_q, sinks, out, sums, peaks, splits, queries, window,
    HEADS: tl.constexpr, DIM: tl.constexpr, LANES: tl.constexpr, WINDOW: tl.constexpr,
    SPLIT_QUERIES: tl.constexpr, KEYS: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """Program (row and query, head): the partials of a row that was cut, in the keys' order."""
    row = tl.program_id(0) // queries
    query = tl.program_id(0) % queries
    head = tl.program_id(1)
    first_token = tl.load(cu_seqlens_q + row)
    new = tl.load(cu_seqlens_q + row + 1) - first_token
    length = tl.load(lengths + row)
    _, segments = _segments(length, new, window, WINDOW, SPLIT_QUERIES, KEYS, SEGMENT)
    if (query >= new) | (segments == 1):
        return
    lane = tl.arange(0, LANES)
    part = (tl.program_id(0).to(tl.int64) * HEADS + head) * splits
    one = tl.arange(0, 1)
    m = tl.full([1], LOWEST, tl.float32)
    s = tl.zeros([1], tl.float32)
    acc = tl.zeros([1, LANES], tl.float32)
    for index in range(segments):
        at = part + index + one
        new_m = tl.load(peaks + at * 2)
        new_s = tl.load(peaks + at * 2 + 1)
        new_acc = tl.load(
            sums + at[:, None] * DIM + lane[None, :], mask=(lane < DIM)[None, :], other=0.0
        )
        top = tl.maximum(m, new_m)
        fade = tl.exp2(m - top)
        new_fade = tl.exp2(new_m - top)
        s = s * fade + new_s * new_fade
        acc = acc * fade[:, None] + new_acc * new_fade[:, None]
        m = top
    acc = _normalised(acc, m, s, sinks, head + one)
    place = out + ((first_token + query).to(tl.int64) * HEADS + head) * DIM + lane
    tl.store(place[None, :], acc.to(out.dtype.element_ty), mask=(lane < DIM)[None, :])


_operator = register(
    "paged_attention(Tensor q, Tensor pages, Tensor page_table, Tensor lengths,"
    " Tensor cu_seqlens_q, float scale, int? window, float? softcap, Tensor? sinks, int max_q,"
    " int max_k) -> Tensor",
    torch_path=_torch,
    triton_path=_triton,
    fake=_fake,
)
