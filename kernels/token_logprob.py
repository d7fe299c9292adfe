"""log p(token) of given tokens from logits: log-softmax in float32, then a gather.

A row is cut into parts of a fixed number of ids. A program takes one or more of them, and each
leaves its maximum m and sum s = sum exp(x - m). Few rows have several programs each, whose parts a
second launch merges; where rows fill a device, one program takes all parts of its row and merges
them itself. The bits are the same both ways: it is one kernel that finds a part's m and s, and

    logsumexp = M + log sum of s_i * exp(m_i - M),     M = max m_i

adds integers, which give one sum in any order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from w2s_fast.kernels.library import constexpr, gpu, jit, register, tl, triton
from w2s_fast.kernels.logsumexp import LOWEST, merge, soften

# What 1 is in a sum of integers, and the reverse: 2^26 ids fit into 63 bits, and a part's share is
# cut off far below where float32 is.
_ONE, _UNIT = constexpr(2.0**36), constexpr(2.0**-36)
_MINUS_LN2 = constexpr(-0.6931471805599453)


def token_logprob(
    logits: Tensor,
    tokens: Tensor,
    *,
    vocab_size: int | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Log-probs of ``tokens`` under softmax(softcap * tanh(scale * logits / softcap)).

        x_v = softcap * tanh(scale * logits_v / softcap)
        out = x_token - max x - log sum_{v < vocab_size} exp(x_v - max x)

    Args:
        logits: [N, V] of any float dtype; rows may lie at any stride.
        tokens: int64 [N], ids below ``vocab_size``. On a GPU another id gives NaN, on the CPU an
            error.
        vocab_size: ids from here on are padding: outside of the softmax. None: V.
        scale: factor on the logits. softcap: None is off.

    Returns:
        float32 [N], in nats. -inf for a token of logit -inf; NaN where a row holds NaN or +inf
        (after scale and softcap), or nothing but -inf.
    """
    if logits.ndim != 2 or tokens.shape != logits.shape[:1]:
        raise ValueError(
            f"logits {tuple(logits.shape)} and tokens {tuple(tokens.shape)} must be [N, V] and [N]"
        )
    logprobs: Tensor = _operator(logits, tokens, vocab_size, scale, softcap)
    return logprobs


def _torch(
    logits: Tensor, tokens: Tensor, vocab_size: int | None, scale: float, softcap: float | None
) -> Tensor:
    logits = logits[:, :vocab_size].float()
    if scale != 1.0:
        logits = logits * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    normaliser = logits.logsumexp(-1)
    normaliser.masked_fill_(normaliser == torch.inf, torch.nan)
    return logits.gather(-1, tokens[:, None])[:, 0] - normaliser


def _fake(
    logits: Tensor, tokens: Tensor, vocab_size: int | None, scale: float, softcap: float | None
) -> Tensor:
    return logits.new_empty(tokens.shape[0], dtype=torch.float32)


class _Launch(NamedTuple):
    """A part is a tile [depth, lanes, vector]; a maximum and a sum are kept for each lane of it."""

    depth: int
    lanes: int
    vector: int  # neighbours that one thread loads at once
    num_warps: int
    programs_per_sm: int  # fewer than these are launched only where the rows have no more parts


def _launch(aligned: bool, softcap: bool) -> _Launch:
    """Launch parameters; one entry serves every architecture so far.

    On an H100 [512, 128256] in bfloat16 is read at 0.80 of a copy's bandwidth, and 16 rows take 6.8
    us (`python -m bench.kernels`).

    A lane of [d, v] costs 1 + 1/(d*v) exponentials a logit, and its part's maximum and sum two
    exchanges between the warps: the more ids a part has, the fewer. With 2 exponentials they would
    be the limit before the memory is: a GPU reads as many half-precision logits a second as it has
    time for 1.7 of each (H200). Where rows are aligned, one thread holds a whole lane of 4 x 8, and
    4 programs of a multiprocessor have 32 KB of half-precision logits under way. Where they are
    not, neighbours lie in different threads, each with an address of its own, and a soft cap's
    arithmetic takes registers, too: parts are half as large, and programs twice as many. 16 rows of
    50,257 are 208 or 400 programs, enough for 132 multiprocessors.
    """
    if not aligned:
        return _Launch(depth=4, lanes=512, vector=1, num_warps=4, programs_per_sm=8)
    if softcap:
        return _Launch(depth=2, lanes=128, vector=8, num_warps=4, programs_per_sm=8)
    return _Launch(depth=4, lanes=128, vector=8, num_warps=4, programs_per_sm=4)


def _triton(
    logits: Tensor, tokens: Tensor, vocab_size: int | None, scale: float, softcap: float | None
) -> Tensor:
    rows = len(tokens)
    out = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows == 0:
        return out
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    vocab = logits.shape[1] if vocab_size is None else min(vocab_size, logits.shape[1])
    launch = _launch(logits.stride(0) % 16 == 0, softcap is not None)
    parts = -(-vocab // (launch.depth * launch.lanes * launch.vector))
    wanted = max(1, gpu(logits.device).sms * launch.programs_per_sm // rows)
    span = -(-parts // min(parts, wanted))
    splits = -(-parts // span)
    most = triton.next_power_of_2(parts)
    largest = total = target = out  # not used where one program takes a row
    if splits > 1:
        largest, total = out.new_empty(2, rows, parts)
        target = torch.empty_like(out)
    _split_rows[(rows * splits,)](
        logits, tokens, largest, total, target, out, logits.stride(0), vocab,
        parts, splits, span, scale, softcap or 0.0, SOFTCAP=softcap is not None, PARTS=most,
        DEPTH=launch.depth, LANES=launch.lanes, VECTOR=launch.vector, num_warps=launch.num_warps,
        enable_fp_fusion=True,
    )  # fmt: skip
    if splits > 1:
        _merge_parts[(rows,)](
            largest, total, target, out, parts, PARTS=most, num_warps=1, enable_fp_fusion=True
        )
    return out


# Only the logits and their stride are worth knowing to be multiples of 16: they are loaded in
# vectors. Where the other buffers begin varies with the number of rows; and how many programs a row
# has may compile nothing anew, which might round a part's sum differently.
@jit(
    do_not_specialize=[
        "tokens", "largest", "total", "target", "out", "vocab_size", "parts", "splits", "span",
    ]
)  # fmt: skip
def _split_rows(
    logits, tokens, largest, total, target, out, row_stride, vocab_size, parts, splits, span,
    scale, softcap, SOFTCAP: tl.constexpr, PARTS: tl.constexpr,
    DEPTH: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Program (row, split) takes ``span`` parts of its row.

    Parts are counted from the row's first logit, not from an aligned address before it: rows of
    an odd vocabulary then load single elements, but equal rows give equal bits wherever they lie,
    and equal scores stay equal.
    """
    row = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    base = logits + row * row_stride
    tile = tl.arange(0, DEPTH)[:, None, None] * (LANES * VECTOR)
    tile += tl.arange(0, LANES)[None, :, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :]

    TILE: tl.constexpr = DEPTH * LANES * VECTOR
    first = split * span
    last = tl.minimum(first + span, parts)
    full = tl.minimum(last, vocab_size // TILE)
    index = tl.arange(0, PARTS)
    m = tl.full([PARTS], LOWEST, tl.float32)
    s = tl.zeros([PARTS], tl.float32)
    for part in range(first, full):
        x = tl.load(base + part * TILE + tile)
        top, sum_of_part = _part(soften(x, scale, softcap, SOFTCAP))
        m = tl.where(index == part, top, m)
        s = tl.where(index == part, sum_of_part, s)
    if full < last:
        ids = full * TILE + tile
        x = tl.load(base + ids, mask=ids < vocab_size, other=0.0)
        x = soften(x, scale, softcap, SOFTCAP)  # masked after it: a soft-capped -inf is finite
        top, sum_of_part = _part(tl.where(ids < vocab_size, x, -float("inf")))
        m = tl.where(index == full, top, m)
        s = tl.where(index == full, sum_of_part, s)

    token = tl.load(tokens + row)
    known = (token >= 0) & (token < vocab_size) & (split == 0)
    x = tl.load(base + token, mask=known, other=float("nan"))
    x = soften(x, scale, softcap, SOFTCAP)
    if splits > 1:
        own = (index >= first) & (index < last)
        tl.store(largest + row * parts + index, m, mask=own)
        tl.store(total + row * parts + index, s, mask=own)
        tl.store(target + row, x, mask=split == 0)
    else:
        tl.store(out + row, _logprob(x, m, s))


@jit(do_not_specialize=["largest", "total", "target", "out", "parts"])
def _merge_parts(largest, total, target, out, parts, PARTS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, PARTS)
    m = tl.load(largest + row * parts + index, mask=index < parts, other=LOWEST)
    s = tl.load(total + row * parts + index, mask=index < parts, other=0.0)
    tl.store(out + row, _logprob(tl.load(target + row), m, s))


@jit
def _part(x):
    """The maximum of a tile x [DEPTH, LANES, VECTOR], and the sum of exp(x - maximum)."""
    top = tl.maximum(tl.max(tl.max(x, 2), 0), LOWEST)
    return merge(top, tl.sum(tl.sum(tl.exp(x - top[None, :, None]), 2), 0), 0)


@jit
def _logprob(x, m, s):
    """x - logsumexp of a row, from the m and s [PARTS] of its parts: equal bits in any layout."""
    top = tl.max(m, 0)
    share = s * tl.exp(m - top)
    broken = tl.max((share != share).to(tl.int32), 0) > 0
    total = tl.sum((tl.where(share == share, share, 0.0) * _ONE).to(tl.int64), 0)
    sum_of_all = tl.where(broken, float("nan"), total.to(tl.float32) * _UNIT)
    # By name: whether a product and a difference become one is the compiler's choice.
    return tl.fma(tl.log2(sum_of_all), _MINUS_LN2, x - top)


_operator = register(
    "token_logprob(Tensor logits, Tensor tokens, int? vocab_size, float scale, float? softcap)"
    " -> Tensor",
    torch_path=_torch,
    triton_path=_triton,
    fake=_fake,
)
