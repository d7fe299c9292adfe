"""log p(token) of given tokens from logits: log-softmax in float32, then a gather."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from w2s_fast.kernels.library import Gpu, gpu, jit, register, tl
from w2s_fast.kernels.logsumexp import LOWEST, merge, merge_splits, soften


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
    """A tile is [depth, lanes, vector] of one row; a maximum and a sum are kept for each lane."""

    depth: int
    lanes: int
    vector: int  # neighbours that one thread loads at once
    num_warps: int
    programs_per_sm: int  # fewer than these are launched only where the rows have no more tiles


def _launch(on: Gpu, aligned: bool) -> _Launch:
    """Launch parameters; one entry serves every architecture so far. Not measured on a GPU.

    A lane is rescaled once a tile, so a tile of [d, *, v] costs 1 + 1/(d*v) exponentials a logit.
    With 2 they would be the limit before the memory is: a GPU reads as many half-precision logits
    a second as it has time for 1.7 exponentials each (H200). Where rows are aligned, one thread
    holds a whole lane of 2 x 8; where not, neighbours lie in different threads, and a lane is one
    id wide. A tile has 2,048 ids in both: 16 rows of 50,257 are 400 programs, of 128,256 they are
    1,008, enough for 132 multiprocessors.
    """
    if aligned:
        return _Launch(depth=2, lanes=128, vector=8, num_warps=4, programs_per_sm=8)
    return _Launch(depth=4, lanes=512, vector=1, num_warps=4, programs_per_sm=8)


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
    on = gpu(logits.device)
    launch = _launch(on, aligned=logits.stride(0) % 16 == 0)
    tiles = -(-vocab // (launch.depth * launch.lanes * launch.vector))
    wanted = max(1, on.sms * launch.programs_per_sm // rows)
    span = -(-tiles // min(tiles, wanted))
    splits = -(-tiles // span)
    partials = out.new_empty(2, rows, splits) if splits > 1 else (out, out)
    target = torch.empty_like(out) if splits > 1 else out
    _split_rows[(rows * splits,)](
        logits, tokens, partials[0], partials[1], target, out, logits.stride(0), vocab,
        splits, span, scale, softcap or 0.0, SOFTCAP=softcap is not None, SPLIT=splits > 1,
        DEPTH=launch.depth, LANES=launch.lanes, VECTOR=launch.vector, num_warps=launch.num_warps,
        enable_fp_fusion=True,
    )  # fmt: skip
    return merge_splits(partials[0], partials[1], target) if splits > 1 else out


# Only the logits and their stride are worth knowing to be multiples of 16: they are loaded in
# vectors. Where the other buffers begin varies with the number of rows.
@jit(
    do_not_specialize=[
        "tokens", "largest", "total", "target", "out", "vocab_size", "splits", "span",
    ]
)  # fmt: skip
def _split_rows(
    logits, tokens, largest, total, target, out, row_stride, vocab_size, splits, span,
    scale, softcap, SOFTCAP: tl.constexpr, SPLIT: tl.constexpr,
    DEPTH: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Program (row, split) takes ``span`` tiles of its row.

    Tiles are counted from the row's first logit, not from an aligned address before it: rows of
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
    last = tl.minimum(first + span, tl.cdiv(vocab_size, TILE))
    full = tl.minimum(last, vocab_size // TILE)
    m = tl.full([LANES], LOWEST, tl.float32)
    s = tl.zeros([LANES], tl.float32)
    for index in range(first, full):
        x = tl.load(base + index * TILE + tile)
        m, s = _add(m, s, soften(x, scale, softcap, SOFTCAP))
    if full < last:
        ids = full * TILE + tile
        x = tl.load(base + ids, mask=ids < vocab_size, other=0.0)
        x = soften(x, scale, softcap, SOFTCAP)  # masked after it: a soft-capped -inf is finite
        m, s = _add(m, s, tl.where(ids < vocab_size, x, -float("inf")))
    top, sum_of_all = merge(m, s, 0)

    token = tl.load(tokens + row)
    known = (token >= 0) & (token < vocab_size)
    if SPLIT:
        tl.store(largest + row * splits + split, top)
        tl.store(total + row * splits + split, sum_of_all)
        known = known & (split == 0)
    x = tl.load(base + token, mask=known, other=float("nan"))
    x = soften(x, scale, softcap, SOFTCAP)
    if SPLIT:
        tl.store(target + row, x, mask=split == 0)
    else:
        tl.store(out + row, x - top - tl.log(sum_of_all))


@jit
def _add(m, s, x):
    """Take a tile x [DEPTH, LANES, VECTOR] into the lanes' maxima and sums."""
    top = tl.maximum(m, tl.max(tl.max(x, 2), 0))
    s = s * tl.exp(m - top) + tl.sum(tl.sum(tl.exp(x - top[None, :, None]), 2), 0)
    return top, s


_operator = register(
    "token_logprob(Tensor logits, Tensor tokens, int? vocab_size, float scale, float? softcap)"
    " -> Tensor",
    torch_path=_torch,
    triton_path=_triton,
    fake=_fake,
)
