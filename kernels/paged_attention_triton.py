"""paged_attention on a GPU: one launch over tiles of queries, and one that finishes their rows.

The kernels, and what a tile is, are in paged_attention_tiles. Here: how long the splits are, how
large the tiles, and how many programs there are.

Where blocks, splits and segments begin follows from the row alone, and a tile only decides which
queries are computed side by side. So a row's arithmetic does not depend on which other rows are in
the launch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from w2s_fast.kernels.library import Gpu, gpu, triton
from w2s_fast.kernels.paged_attention_tiles import attend, finish

# Rows of more new tokens than this are never cut, and share nothing. Their queries alone fill
# tiles and are work for many programs, so packing siblings together would save few reads: with 17
# queries of 4 heads a tile of 64 does 64 operations for each byte of keys that it reads, with full
# tiles of 128 it would be 128. What it costs grows with the queries: a partial result is
# 4 * (D + 2) bytes, written and read again, for each of them, each head and each split.
SPLIT_QUERIES = 16
# Keys that one program takes; a multiple of every block. A partial result of a query of D = 128
# moves as many bytes as two keys in 16 bits. On an H200 a layer of gpt2-xl over a prompt of 512
# took 15.1, 12.7 and 11.9 us for one request with splits of 512, 256 and 128, and 73, 78 and 86 us
# for 32, each finished in four warps (`python -m bench.attention_tiles`).
SPLIT_KEYS = 256
# Own keys of a row that shares others which are too few for a tile of their own. A chunk of the
# search has as many tokens at most, or is long enough that tiles are worth their launch.
FEW_KEYS = 32


class _Finish(NamedTuple):
    """A program has ``items`` queries of a head, and ``keys`` of each at a time."""

    items: int
    keys: int
    num_warps: int


def _finish(dim: int) -> _Finish:
    """Launch parameters by head size, a power of two; a row's arithmetic depends on ``keys``.

    The work is to wait for memory: many programs of one warp, of 64 to 128 registers a thread. On
    an H200, 32 requests of gpt2-xl, with splits of 512: 62 us a layer with 4 items and 4 keys, 61
    with 8 and 4 (for which Triton 3.9 takes all registers), 73 with 8 and 8 in four warps. One of
    an 8B over a prompt of 4,096, with splits of 256: 20.8, 23.3 and 28.2 us with 1, 2 and 4 items;
    22.1 with a tile for each tail (`python -m bench.attention_tiles`).
    """
    return _Finish(items=4 if dim <= 64 else 1, keys=4, num_warps=1)


class _Launch(NamedTuple):
    """A program multiplies [tile, D] queries with [keys, D] keys at a time."""

    tile: int  # queries of a row, times heads of a group
    shared_tile: int  # queries of neighbouring rows, times heads of a group
    keys: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None  # registers of a thread; None: the compiler decides


def _launch(
    on: Gpu, items: int, shared_items: int, group: int, dim: int, element_size: int
) -> _Launch:
    """Launch parameters: fixed by architecture, dtype and head size.

    On an H200, 16 requests of an 8B took 45 us a layer with them, 44 with blocks of 32 keys, 46
    with two stages, 53 with shared tiles of 32, and 59 with 8 warps (`python -m
    bench.attention_tiles`).

    Args:
        items: the most new tokens of a row, times the heads of a group.
        shared_items: the most new tokens of a segment's rows, times the heads of a group; 0 where
            nothing is shared.
        group: query heads of a group. dim: a power of two.

    ``keys`` decides the order of a row's sums, so it must not depend on ``items``, in which other
    rows have a say. A tile of 16 is the least that a product takes, one of 64 the least that fills
    a WGMMA. Both kinds of tiles stand in one kernel: a shared one takes no more warps, and no more
    than 64 items, whose registers the many short own tails would have to pay for. With two stages,
    keys are loaded between products; with three, during them.

    With shared tiles of more than 16 items and D > 64, shared memory has room for two programs, and
    so may a thread have 255 registers. The compiler does not know it: it aims at three programs and
    spills a few registers, or takes all. Both kinds of tiles fit into 240, with all options.
    """
    if element_size == 4:  # no exact tensor-core product: small tiles, few registers
        return _Launch(tile=16, shared_tile=16, keys=32, num_warps=8, num_stages=2)
    warp_groups = 90 <= on.arch < 120  # products of 64 rows by four warps at once
    largest = 64 if dim > 128 or (dim > 64 and not warp_groups) else 128
    tile = next((t for t in (16, 32, 64) if items <= t), largest)
    widest = 128 if warp_groups else 64  # of 64 rows without a spill in four warps
    num_warps = 4 if tile <= 32 or (tile == 64 and dim <= widest) else 8
    # Of groups of one head, shared tiles of 64 x 128 spill in four warps on every architecture.
    widest_shared = widest if group > 1 else 64
    largest_shared = 64 if num_warps == 8 or dim <= widest_shared else 32
    shared_tile = next((t for t in (16, 32) if shared_items <= t), largest_shared)
    small = on.arch in (86, 89, 120)  # 99 KiB of shared memory
    return _Launch(
        tile,
        shared_tile,
        keys=32 if dim > 128 else 64,
        num_warps=num_warps,
        num_stages=2 if small and max(tile, shared_tile) * dim > 4096 else 3,
        maxnreg=240 if shared_tile > 16 and dim > 64 else None,
    )


def launch(
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
    own: Tensor | None,
    parts: Tensor | None,
    token_rows: Tensor | None,
    splits: Tensor | None,
    max_tokens: int,
    max_parts: int,
    max_own: int,
    table_start: Tensor | None = None,
) -> Tensor:
    """The operator for float16, bfloat16 and float32, D up to 256, and at least one query."""
    _, heads, dim = q.shape
    rows = len(lengths)
    if q.stride(2) != 1:
        q = q.contiguous()
    if page_table.stride(-1) != 1:
        page_table = page_table.contiguous()
    table_stride = page_table.stride(0) if table_start is None else 0
    table_start = None if table_start is None else table_start.contiguous()
    lengths, cu_seqlens_q = lengths.contiguous(), cu_seqlens_q.contiguous()
    sinks = None if sinks is None else sinks.contiguous()
    page_size, kv_heads = pages.shape[2:4]
    group = heads // kv_heads
    padded = max(16, triton.next_power_of_2(dim))
    entries = 0
    if splits is None or own is None or parts is None or token_rows is None:
        own = parts = token_rows = splits = None
        max_parts, max_tokens = 0, 0
    else:
        own, parts, token_rows = own.contiguous(), parts.contiguous(), token_rows.contiguous()
        splits = splits.contiguous()
        entries = len(splits)
    table = _launch(
        gpu(q.device), max_q * group, max_tokens * group, group, padded, q.element_size()
    )
    blocks = -(-max_q * group // table.tile)
    shared_blocks = -(-max_tokens * group // table.shared_tile)
    # As many splits as the longest own tail that is cut may have.
    queries = min(max_q, SPLIT_QUERIES)
    longest = max_own if window is None else min(max_own, window + queries + table.keys - 2)
    own_splits = max(1, -(-longest // SPLIT_KEYS))
    few = FEW_KEYS if splits is not None else 0
    if longest <= few and max_q == queries:
        own_splits = 0  # all of them are finished without
    most = max_parts + own_splits
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    sums = peaks = out  # not used unless a row may have more than one partial result
    finishes = few > 0 or most > 1
    if finishes:
        places = (rows * queries, heads, most)
        sums = torch.empty(*places, dim, dtype=torch.float32, device=q.device)
        peaks = torch.empty(*places, 2, dtype=torch.float32, device=q.device)
    both = {
        "HEADS": kv_heads, "GROUP": group, "DIM": dim, "LANES": padded, "PAGE_SIZE": page_size,
        "WINDOW": window is not None, "SOFTCAP": softcap is not None,
        "SPLIT_QUERIES": SPLIT_QUERIES, "KEYS": table.keys, "SPLIT_KEYS": SPLIT_KEYS, "FEW": few,
    }  # fmt: skip
    programs = (entries * shared_blocks + rows * blocks * own_splits) * kv_heads
    if programs > 0:
        attend[(programs,)](
            q, pages, page_table, table_start, lengths, cu_seqlens_q, sinks, own, parts, token_rows,
            splits, out, sums, peaks, q.stride(0), q.stride(1), pages.stride(0), table_stride,
            entries, shared_blocks, rows, blocks, own_splits, most, queries, window or 0, scale,
            softcap or 0.0, TAILS=own_splits > 0, CUT=most > 1, SHARED_TILE=table.shared_tile,
            TILE=table.tile, **both,
            num_warps=table.num_warps, num_stages=table.num_stages, maxnreg=table.maxnreg,
            enable_fp_fusion=True,
        )  # fmt: skip
    if finishes:
        last = _finish(padded)
        items = rows * queries * heads
        finish[(-(-items // last.items),)](
            q, pages, page_table, table_start, lengths, cu_seqlens_q, sinks, own, parts, out, sums,
            peaks, q.stride(0), q.stride(1), pages.stride(0), table_stride, items, most, queries,
            window or 0, scale, softcap or 0.0, **both, ITEMS=last.items, AT_ONCE=last.keys,
            num_warps=last.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out
