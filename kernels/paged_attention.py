"""Attention of new tokens over paged keys and values: decoding and appending in one operator.

Keys and values stand in pages that rows may share, found through a table of pages (PagedAttention:
Kwon et al., arXiv 2309.06180). The rows of a search are a tree, and what a subtree shares is read
once for all of its rows where ``shared`` says so; the idea is DeFT's (arXiv 2404.00242) and
FastTree's. The kernels are in paged_attention_tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from w2s_fast.kernels.library import register
from w2s_fast.kernels.paged_attention_triton import launch

_SERVED = (torch.float16, torch.bfloat16, torch.float32)
_LARGEST_DIM = 256


class SharedSegments(NamedTuple):
    """Which keys neighbouring rows have in common: runs of positions, cut into splits.

    The segments of a row cover its keys 0 : own without gaps, and all of them were written before
    this call. A segment begins and ends at the same positions for each of its rows, and so does
    every segment before it. In the place of each split, the pages of ``table_row`` hold the keys
    and values of all the rows; their own pages hold the same, but need not be the same pages.

    Nothing changes while rows grow by decoding: only ``max_own`` has to cover what comes.

    Attributes:
        own: int32 [S], where each row's own keys begin; 0 for a row that shares nothing.
        parts: int32 [S], how many splits the row's segments have: as many partial results.
        token_rows: int32 [T], the row of each token. Tokens of no row may have any number.
        splits: int32 [N, 6], longest work first; each is (first_token, tokens, begin, end,
            table_row, part): the tokens of the segment's rows, the positions begin : end of at
            most SPLIT_KEYS keys, the row whose pages they are found by, and how many splits come
            before it in its rows. One of 0 tokens does nothing: room for launches in graphs.
        max_tokens, max_parts, max_own: bounds of the tokens of a split, the parts of a row, and
            the keys that no segment holds, of a row of at most SPLIT_QUERIES new tokens: others'
            keys are not cut. Known to the host, see ``max_q``.
    """

    own: Tensor
    parts: Tensor
    token_rows: Tensor
    splits: Tensor
    max_tokens: int
    max_parts: int
    max_own: int


_NOTHING_SHARED = (None, None, None, None, 0, 0, 0)


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
    max_own: int | None = None,
    shared: SharedSegments | None = None,
    table_start: Tensor | None = None,
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
            Entries past a row's length are not used. See ``table_start`` for int32 [P].
        lengths: int32 [S], the keys of each row.
        cu_seqlens_q: int32 [S + 1]; row s has the tokens cu_seqlens_q[s] : cu_seqlens_q[s + 1],
            which may be none.
        scale: factor on q . k. window: how many keys a query sees, its own included.
        softcap: None is off. sinks: [H] of any float dtype, one more logit for each head.
        max_q, max_k: bounds of the new tokens and the keys of a row. They are known to the host
            and choose the launch; data on the device is never read for it, so that a launch can
            be captured in a graph and replayed for other lengths within the bounds.
        max_own: where nothing is shared, what SharedSegments calls so: 0 if every row has more than
            SPLIT_QUERIES new tokens, for then no keys are cut. None: ``max_k``.
        shared: which keys rows have in common; None: none, or it is not known. Rows of more than
            SPLIT_QUERIES new tokens share nothing. It changes how often keys are read, and the
            order of a row's sums, never their terms.
        table_start: int32 [S]; with it page_table is int32 [P], and entry m of row s is its number
            table_start[s] + m, which may be negative for entries that no one reads. A row needs
            those from its first own key on, and, if splits are found by it, from the first of
            these on: what rows share need stand there once. None: page_table is [S, M].

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
        page_table.ndim != (2 if table_start is None else 1)
        or (table_start is None and lengths.shape != page_table.shape[:1])
        or lengths.ndim != 1
        or cu_seqlens_q.shape != (len(lengths) + 1,)
    ):
        table = "[S, M]" if table_start is None else "[P]"
        raise ValueError(
            f"page_table {tuple(page_table.shape)}, lengths {tuple(lengths.shape)} and"
            f" cu_seqlens_q {tuple(cu_seqlens_q.shape)} must be {table}, [S] and [S + 1]"
        )
    if table_start is not None and table_start.shape != lengths.shape:
        raise ValueError(f"table_start {tuple(table_start.shape)} must be [S] = [{len(lengths)}]")
    if sinks is not None and sinks.shape != q.shape[1:2]:
        raise ValueError(f"sinks {tuple(sinks.shape)} must be [H] = [{q.shape[1]}]")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}: a query sees at least its own key")
    if shared is not None and (
        shared.own.shape != lengths.shape
        or shared.parts.shape != lengths.shape
        or shared.token_rows.shape != q.shape[:1]
        or shared.splits.ndim != 2
        or shared.splits.shape[1] != 6
    ):
        raise ValueError(
            f"own {tuple(shared.own.shape)}, parts {tuple(shared.parts.shape)}, token_rows"
            f" {tuple(shared.token_rows.shape)} and splits {tuple(shared.splits.shape)} of shared"
            " must be [S], [S], [T] and [N, 6]"
        )
    nothing = (*_NOTHING_SHARED[:-1], max_k if max_own is None else max_own)
    out: Tensor = _operator(
        q, pages, page_table, lengths, cu_seqlens_q, scale, window, softcap, sinks, max_q, max_k,
        *(shared or nothing), table_start,
    )  # fmt: skip
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
    own: Tensor | None,
    parts: Tensor | None,
    token_rows: Tensor | None,
    splits: Tensor | None,
    max_tokens: int,
    max_parts: int,
    max_own: int,
    table_start: Tensor | None = None,
) -> Tensor:
    """All rows at once, padded to ``max_q`` queries and ``max_k`` keys.

    What is shared only says where a row's pages are found, if they are not all in its own entries.
    """
    tokens, heads, dim = q.shape
    rows = len(lengths)
    _, count, page_size, kv_heads, _ = pages.shape
    # Every page of a row has an entry: in its own table, or in one that it shares.
    longest = min(max_k, page_table.shape[-1] * page_size)
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
    if table_start is None:
        page = page_table.long().gather(1, place // page_size)
    else:
        first = table_start.long()[:, None]
        if own is not None and parts is not None and splits is not None:
            first = first[_found_by(t, own, parts, splits, start, max_parts), 0]
        entry = torch.where(written, first + place // page_size, 0)
        # A row without queries may need entries that do not exist, and is not needed itself.
        page = page_table.long()[entry.clamp(0, len(page_table) - 1)]
    page = page.clamp(0, count - 1)
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


def _found_by(
    t: Tensor, own: Tensor, parts: Tensor, splits: Tensor, start: Tensor, max_parts: int
) -> Tensor:
    """The row by whose entries each key ``t`` [L] of each row is found, int64 [S, L].

    ``start``: int64 [S + 1], cu_seqlens_q. A row without queries may get any.
    """
    rows = len(own)
    row = torch.arange(rows, device=t.device)
    first_token, count, _, end, table_row, part = splits.long().T[:, None, :]  # [1, N] each
    tokens = start[:-1, None]
    covers = (first_token <= tokens) & (tokens < first_token + count)  # [S, N]
    # A row's splits by their number; those that are none of the row go where nobody looks.
    place = torch.where(covers, part, max_parts)
    by_part = torch.zeros(2, rows, max_parts + 1, dtype=torch.int64, device=t.device)
    by_part.scatter_(2, place.expand(2, -1, -1), torch.stack([table_row, end]).expand(2, rows, -1))
    table_rows, ends = by_part
    ends = torch.where(torch.arange(max_parts + 1, device=t.device) < parts[:, None], ends, 2**31)
    behind = torch.searchsorted(ends, t.expand(rows, -1).contiguous(), right=True)
    return torch.where(t < own[:, None], table_rows.gather(1, behind), row[:, None])


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
    own: Tensor | None,
    parts: Tensor | None,
    token_rows: Tensor | None,
    splits: Tensor | None,
    max_tokens: int,
    max_parts: int,
    max_own: int,
    table_start: Tensor | None = None,
) -> Tensor:
    return q.new_empty(q.shape)


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
    own: Tensor | None,
    parts: Tensor | None,
    token_rows: Tensor | None,
    splits: Tensor | None,
    max_tokens: int,
    max_parts: int,
    max_own: int,
    table_start: Tensor | None = None,
) -> Tensor:
    serves = q.dtype in _SERVED and q.shape[2] <= _LARGEST_DIM
    path = launch if serves and q.numel() > 0 and len(lengths) * max_q > 0 else _torch
    return path(
        q, pages, page_table, lengths, cu_seqlens_q, scale, window, softcap, sinks, max_q, max_k,
        own, parts, token_rows, splits, max_tokens, max_parts, max_own, table_start,
    )  # fmt: skip


_operator = register(
    "paged_attention(Tensor q, Tensor pages, Tensor page_table, Tensor lengths,"
    " Tensor cu_seqlens_q, float scale, int? window, float? softcap, Tensor? sinks, SymInt max_q,"
    " SymInt max_k, Tensor? own, Tensor? parts, Tensor? token_rows, Tensor? splits,"
    " SymInt max_tokens, SymInt max_parts, SymInt max_own, Tensor? table_start=None) -> Tensor",
    torch_path=_torch,
    triton_path=_triton,
    fake=_fake,
)
