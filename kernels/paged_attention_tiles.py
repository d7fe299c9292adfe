"""Triton kernels of paged_attention: tiles of queries over keys, and the merge of their results.

    attend   a shared tile   some queries of a segment's rows, siblings beside each other, over at
                             most SPLIT_KEYS of the keys that these rows share
             an own tail     some queries of one row over at most SPLIT_KEYS of the keys that no
                             segment holds: all its keys where nothing is shared
    finish   some queries    merges the partial results of rows that have more than one, behind
             and heads       them the own keys of rows that share others and have few: at most FEW

A tile holds queries times the query heads of one head of keys, so that keys are read once for all
of them. It walks over its keys block by block with an online softmax (FlashAttention-2: Dao, arXiv
2307.08691). A row's partial results are numbered along its keys, those of its segments first, and
merged in that order (split KV, as in flash-decoding: Dao, Haziza, Massa and Sizov). Both kinds of
tiles stand in one launch, as in FastTree and DeFT (arXiv 2404.00242): a launch for each level of
the tree would leave most of the device idle.

Rows of a search differ in the few tokens of a chunk. A tile for each of these tails would be most
programs of a launch, and hardly any of its work: on an H100 they took half of its time.
"""

from __future__ import annotations

from w2s_fast.kernels.library import constexpr, jit, tl
from w2s_fast.kernels.logsumexp import LOWEST, soften

# The kernels' logits are in units of log 2: exp2 is the instruction, exp is a product more.
_LOG2E = constexpr(1.4426950408889634)
# Columns of ``splits``, see SharedSegments.
_COLUMNS = constexpr(6)


@jit
def _own_splits(
    row, own, length, new, window,
    WINDOW: tl.constexpr, SPLIT_QUERIES: tl.constexpr, KEYS: tl.constexpr,
    SPLIT_KEYS: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """Where a row's own keys and its first own split begin, and how many splits it has.

    From the row alone, or of several rows. The own keys are all keys if nothing is shared. No split
    where they are at most FEW.
    """
    base = length * 0
    if own is not None:
        base = tl.load(own + row)
    origin = base
    if WINDOW:
        origin += tl.maximum(length - new - window + 1 - base, 0) // KEYS * KEYS
    count = tl.maximum((length - origin + SPLIT_KEYS - 1) // SPLIT_KEYS, 1)
    if FEW > 0:
        count = tl.where(length - origin <= FEW, 0, count)
    return base, origin, tl.where(new > SPLIT_QUERIES, 1, count)


@jit
def _normalised(acc, m, s, sinks, head):
    """acc [N, LANES] over the sum s [N] of its weights, with the weight of the sink if any."""
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * _LOG2E
        top = tl.maximum(m, sink)
        s = s * tl.exp2(m - top) + tl.exp2(sink - top)
        acc = acc * tl.exp2(m - top)[:, None]
    return acc * (1.0 / tl.where(s == 0, 1.0, s))[:, None]  # nothing seen: 0


@jit
def _entries(page_table, table_start, table_stride, row):
    """Where entry 0 of a row's pages stands, or would, if a ragged table had it."""
    first = row.to(tl.int64) * table_stride
    if table_start is not None:
        first = tl.load(table_start + row)
    return page_table + first


@jit
def _walk(
    asked, keys, values, table, begin, end, first, last, scale, softcap,
    TILE: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, LANES: tl.constexpr,
    PAGE_SIZE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A tile of queries ``asked`` [TILE, LANES] over the keys begin : end of a row.

    Its pages are found by ``table``, of which no entry is read before that of ``begin``.

    An item sees the keys from ``first`` on, in a window, to ``last``: numbers, or [TILE, 1].
    Returns maxima m and sums s of the weights, [TILE], and the weighted values acc [TILE, LANES];
    (LOWEST, 0, 0) for an item that sees nothing.
    """
    lane = tl.arange(0, LANES)
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
        place = page * (PAGE_SIZE * HEADS * DIM) + (key % PAGE_SIZE) * (HEADS * DIM)
        known = written[:, None] & (lane < DIM)[None, :]
        at = keys + place[:, None] + lane[None, :]
        k = tl.load(at, mask=known, other=0.0)
        x = tl.dot(asked, tl.trans(k), input_precision="ieee")
        x = soften(x, scale, softcap, SOFTCAP) * _LOG2E
        seen = key[None, :] <= last
        if WINDOW:
            seen = seen & (key[None, :] >= first)
        x = tl.where(seen, x, -float("inf"))

        top = tl.maximum(m, tl.max(x, 1))
        weight = tl.exp2(x - top[:, None])
        fade = tl.exp2(m - top)
        s = s * fade + tl.sum(weight, 1)
        acc = acc * fade[:, None]
        v = tl.load(at + values, mask=known, other=0.0)
        acc = tl.dot(weight.to(v.dtype), v, acc, input_precision="ieee")
        m = top
    return m, s, acc


@jit
def _store_part(
    sums, peaks, place, m, s, acc, real, begin, end, DIM: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """Keep a partial result for the merge, which reads no acc of items that saw nothing.

    A tile that had no keys to walk over, begin : end, does not even write it.
    """
    lane = tl.arange(0, LANES)
    tl.store(peaks + place * 2, m, mask=real)
    tl.store(peaks + place * 2 + 1, s, mask=real)
    # Not a constant bound: the stores are narrow for it, but leave in the products' own layout. To
    # change it for wide stores spilled registers of tiles of 64 x 128 in four warps.
    width = tl.where(begin < end, DIM, 0)
    inside = real[:, None] & (lane < width)[None, :]
    tl.store(sums + place[:, None] * DIM + lane[None, :], acc, mask=inside)


# Strides of q, and the size of the pages, are the model's; the rest varies from call to call.
@jit(
    do_not_specialize=[
        "page_table", "table_start", "lengths", "cu_seqlens_q", "sinks", "own", "parts",
        "token_rows", "splits", "sums", "peaks", "table_stride", "entries", "shared_blocks", "rows",
        "blocks", "own_splits", "most", "queries", "window",
    ]
)  # fmt: skip
def attend(
    q, pages, page_table, table_start, lengths, cu_seqlens_q, sinks, own, parts, token_rows, splits,
    out, sums, peaks, q_token, q_head, values, table_stride, entries, shared_blocks, rows, blocks,
    own_splits, most, queries, window, scale, softcap,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, LANES: tl.constexpr,
    PAGE_SIZE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, TAILS: tl.constexpr,
    CUT: tl.constexpr, SPLIT_QUERIES: tl.constexpr, SHARED_TILE: tl.constexpr, TILE: tl.constexpr,
    KEYS: tl.constexpr, SPLIT_KEYS: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """Program (tile, key head): first the shared tiles, which are the longest work, then own tails.

    Values lie ``values`` elements behind the keys.
    """
    kv_head = tl.program_id(0) % HEADS
    tile = tl.program_id(0) // HEADS
    if splits is not None:
        if tile < entries * shared_blocks:
            _shared_tile(
                tile // shared_blocks, tile % shared_blocks, kv_head,
                q, pages, page_table, table_start, lengths, cu_seqlens_q, token_rows, splits, sums,
                peaks, q_token, q_head, values, table_stride, most, queries, window, scale, softcap,
                HEADS, GROUP, DIM, LANES, PAGE_SIZE, WINDOW, SOFTCAP, SHARED_TILE, KEYS,
            )  # fmt: skip
            return
        tile -= entries * shared_blocks
    # Rows vary fastest: siblings run side by side and find the pages they share in the cache. The
    # last block of queries, which sees the most keys, begins first.
    if TAILS:
        _own_tail(
            tile % rows, blocks - 1 - tile // rows // own_splits, tile // rows % own_splits,
            kv_head, q, pages, page_table, table_start, lengths, cu_seqlens_q, sinks, own, parts,
            out, sums, peaks, q_token, q_head, values, table_stride, most, queries, window, scale,
            softcap, HEADS, GROUP, DIM, LANES, PAGE_SIZE, WINDOW, SOFTCAP, CUT, SPLIT_QUERIES,
            TILE, KEYS, SPLIT_KEYS, FEW,
        )  # fmt: skip


@jit
def _shared_tile(
    entry, block, kv_head,
    q, pages, page_table, table_start, lengths, cu_seqlens_q, token_rows, splits, sums, peaks,
    q_token, q_head, values, table_stride, most, queries, window, scale, softcap,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, LANES: tl.constexpr,
    PAGE_SIZE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, TILE: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """TILE items of the rows of a segment over the keys of one of its splits."""
    entry = splits + entry * _COLUMNS
    first_token = tl.load(entry)
    tokens = tl.load(entry + 1)
    first_item = block * TILE
    if first_item >= tokens * GROUP:
        return
    begin = tl.load(entry + 2)
    end = tl.load(entry + 3)
    table = _entries(page_table, table_start, table_stride, tl.load(entry + 4))
    part = tl.load(entry + 5)

    item = first_item + tl.arange(0, TILE)
    real = item < tokens * GROUP
    token = (first_token + item // GROUP).to(tl.int64)
    head = kv_head * GROUP + item % GROUP
    lane = tl.arange(0, LANES)
    at = token[:, None] * q_token + head[:, None] * q_head + lane[None, :]
    asked = tl.load(q + at, mask=real[:, None] & (lane < DIM)[None, :], other=0.0)

    # Shared keys stand before every query, so only a window hides any.
    first = begin
    if WINDOW:
        row = tl.load(token_rows + token, mask=real, other=0)
        next_row = tl.load(cu_seqlens_q + row + 1)
        position = (tl.load(lengths + row) - next_row + token).to(tl.int32)
        first = (position - window + 1)[:, None]
        # Blocks that no query of the tile sees would change no bit, and are left out.
        earliest = tl.min(tl.where(real, position, 2147483647), 0)
        begin += tl.maximum(earliest - window + 1 - begin, 0) // KEYS * KEYS
    m, s, acc = _walk(
        asked, pages + kv_head * DIM, values, table, begin, end, first, end - 1, scale, softcap,
        TILE, HEADS, DIM, LANES, PAGE_SIZE, WINDOW, SOFTCAP, KEYS,
    )  # fmt: skip
    # Read again, and so volatile: the walk leaves no registers to keep anything in.
    token = tl.load(entry, volatile=True) + item // GROUP
    row = tl.load(token_rows + token, mask=real, other=0)
    query = token - tl.load(cu_seqlens_q + row)
    place = (row * queries + query).to(tl.int64) * (HEADS * GROUP) + head
    _store_part(sums, peaks, place * most + part, m, s, acc, real, begin, end, DIM, LANES)


@jit
def _own_tail(
    row, block, split, kv_head,
    q, pages, page_table, table_start, lengths, cu_seqlens_q, sinks, own, parts, out, sums, peaks,
    q_token, q_head, values, table_stride, most, queries, window, scale, softcap,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, LANES: tl.constexpr,
    PAGE_SIZE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, CUT: tl.constexpr,
    SPLIT_QUERIES: tl.constexpr, TILE: tl.constexpr, KEYS: tl.constexpr,
    SPLIT_KEYS: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """TILE items of one row over the keys of one of its own splits."""
    first_item = block * TILE
    first_token = tl.load(cu_seqlens_q + row)
    new = tl.load(cu_seqlens_q + row + 1) - first_token
    if first_item >= new * GROUP:
        return
    length = tl.load(lengths + row)
    base, origin, count = _own_splits(
        row, own, length, new, window, WINDOW, SPLIT_QUERIES, KEYS, SPLIT_KEYS, FEW
    )
    if split >= count:
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

    # Blocks that no query of the tile sees would change no bit, and are left out.
    begin = origin
    if WINDOW:
        earliest = length - new + first_item // GROUP
        begin = base + tl.maximum(earliest - window + 1 - base, 0) // KEYS * KEYS
    end = length - new + tl.minimum(new, (first_item + TILE - 1) // GROUP + 1)
    if CUT:
        begin = tl.maximum(begin, origin + split * SPLIT_KEYS)
        end = tl.where(count > 1, tl.minimum(end, origin + (split + 1) * SPLIT_KEYS), end)
    table = _entries(page_table, table_start, table_stride, row)
    m, s, acc = _walk(
        asked, pages + kv_head * DIM, values, table, begin, end,
        (position - window + 1)[:, None], position[:, None], scale, softcap,
        TILE, HEADS, DIM, LANES, PAGE_SIZE, WINDOW, SOFTCAP, KEYS,
    )  # fmt: skip

    if CUT:
        before = 0
        if parts is not None:
            before = tl.load(parts + row)
        if before + count > 1:
            place = (row * queries + query).to(tl.int64) * (HEADS * GROUP) + head
            place = place * most + before + split
            _store_part(sums, peaks, place, m, s, acc, real, begin, end, DIM, LANES)
            return
    acc = _normalised(acc, m, s, sinks, head)
    place = out + token[:, None] * (HEADS * GROUP * DIM) + head[:, None] * DIM + lane[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=real[:, None] & (lane < DIM)[None, :])


@jit
def _few_keys(
    asked, m, s, acc, keys, values, table, origin, last, window, scale, softcap,
    HEADS: tl.constexpr, DIM: tl.constexpr, LANES: tl.constexpr, PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Items ``asked`` [N, LANES] with m, s, acc so far, over keys of their own: origin : last + 1.

    All but the constants, ``values``, ``window`` and the factors are of each item. AT_ONCE keys of
    all items at a time, so that an item's sums depend on its own keys alone.
    """
    lane = tl.arange(0, LANES)
    for start in range(0, tl.max(last - origin + 1, 0), AT_ONCE):
        key = origin[:, None] + start + tl.arange(0, AT_ONCE)[None, :]
        seen = key <= last[:, None]
        if WINDOW:
            seen = seen & (key > last[:, None] - window)
        page = tl.load(table[:, None] + key // PAGE_SIZE, mask=seen, other=0).to(tl.int64)
        place = page * (PAGE_SIZE * HEADS * DIM) + (key % PAGE_SIZE) * (HEADS * DIM)
        at = keys[:, None, None] + place[:, :, None] + lane[None, None, :]
        known = seen[:, :, None] & (lane < DIM)[None, None, :]
        k = tl.load(at, mask=known, other=0.0).to(tl.float32)
        v = tl.load(at + values, mask=known, other=0.0).to(tl.float32)
        x = soften(tl.sum(asked[:, None, :] * k, 2), scale, softcap, SOFTCAP) * _LOG2E
        x = tl.where(seen, x, -float("inf"))
        top = tl.maximum(m, tl.max(x, 1))
        weight = tl.exp2(x - top[:, None])
        fade = tl.exp2(m - top)
        s = s * fade + tl.sum(weight, 1)
        acc = acc * fade[:, None] + tl.sum(weight[:, :, None] * v, 1)
        m = top
    return m, s, acc


@jit(
    do_not_specialize=[
        "page_table", "table_start", "lengths", "cu_seqlens_q", "sinks", "own", "parts", "sums",
        "peaks", "table_stride", "items", "most", "queries", "window",
    ]
)  # fmt: skip
def finish(
    q, pages, page_table, table_start, lengths, cu_seqlens_q, sinks, own, parts, out, sums, peaks,
    q_token, q_head, values, table_stride, items, most, queries, window, scale, softcap,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, LANES: tl.constexpr,
    PAGE_SIZE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    SPLIT_QUERIES: tl.constexpr, KEYS: tl.constexpr, SPLIT_KEYS: tl.constexpr, FEW: tl.constexpr,
    ITEMS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Program: ITEMS items, each a query and a head, of neighbouring heads and then queries.

    A query's partial results in their order, and behind them its own keys where these are few,
    AT_ONCE of all items at a time. Products are sums of float32, not of tensor cores: an item has
    keys of its own.
    """
    item = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    real = item < items
    item = tl.where(real, item, 0)
    head = item % (HEADS * GROUP)
    row = item // (HEADS * GROUP) // queries
    query = item // (HEADS * GROUP) % queries
    first_token = tl.load(cu_seqlens_q + row)
    new = tl.load(cu_seqlens_q + row + 1) - first_token
    length = tl.load(lengths + row)
    _, origin, total = _own_splits(
        row, own, length, new, window, WINDOW, SPLIT_QUERIES, KEYS, SPLIT_KEYS, FEW
    )
    few = total == 0
    if parts is not None:
        total += tl.load(parts + row)
    real = real & (query < new) & (few | (total > 1))
    total = tl.where(real, total, 0)
    lane = tl.arange(0, LANES)
    m = tl.full([ITEMS], LOWEST, tl.float32)
    s = tl.zeros([ITEMS], tl.float32)
    acc = tl.zeros([ITEMS, LANES], tl.float32)
    place = item.to(tl.int64) * most
    for part in range(tl.max(total, 0)):
        known = part < total
        part_m = tl.load(peaks + (place + part) * 2, mask=known, other=LOWEST)
        part_s = tl.load(peaks + (place + part) * 2 + 1, mask=known, other=0.0)
        kept = (part_s != 0)[:, None] & (lane < DIM)[None, :]  # others were not stored
        stored = sums + (place + part)[:, None] * DIM + lane[None, :]
        part_acc = tl.load(stored, mask=kept, other=0.0)
        top = tl.maximum(m, part_m)
        fade, part_fade = tl.exp2(m - top), tl.exp2(part_m - top)
        s = s * fade + part_s * part_fade
        acc = acc * fade[:, None] + part_acc * part_fade[:, None]
        m = top

    token = (first_token + query).to(tl.int64)
    if FEW > 0:
        at = token[:, None] * q_token + head[:, None] * q_head + lane[None, :]
        asked = tl.load(q + at, mask=real[:, None] & (lane < DIM)[None, :], other=0.0)
        m, s, acc = _few_keys(
            asked.to(tl.float32), m, s, acc, pages + head // GROUP * DIM, values,
            _entries(page_table, table_start, table_stride, row), origin,
            tl.where(real & few, length - new + query, -1), window, scale, softcap,
            HEADS, DIM, LANES, PAGE_SIZE, WINDOW, SOFTCAP, AT_ONCE,
        )  # fmt: skip
    acc = _normalised(acc, m, s, sinks, head)
    given = out + token[:, None] * (HEADS * GROUP * DIM) + head[:, None] * DIM + lane[None, :]
    tl.store(given, acc.to(out.dtype.element_ty), mask=real[:, None] & (lane < DIM)[None, :])
