"""log p(token) from hidden states: LM head, log-softmax and gather in one, without the logits.

A program takes a tile of the vocabulary for a block of rows and leaves its maximum and sum; a
second launch merges them (:mod:`w2s_fast.kernels.logsumexp`). That is cut cross-entropy's forward
pass (Wijmans et al., arXiv 2411.09009) with split partials, as verl has them, in place of a lock.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from w2s_fast.kernels.library import Gpu, gpu, jit, register, tl
from w2s_fast.kernels.logsumexp import LOWEST, merge_splits, soften
from w2s_fast.kernels.token_logprob import token_logprob

# Logits of one block, float32. On a CPU: small enough to stay in the cache between the matrix
# product and the two passes over it, large enough for the product to run at its full rate.
_BLOCK_BYTES = 16 * 2**20
# On a GPU every block reads the whole head again, and it takes a few hundred rows for that to
# hide behind the arithmetic: 523 rows of 128,256.
_CUDA_BLOCK_BYTES = 256 * 2**20
_SERVED = (torch.float16, torch.bfloat16, torch.float32)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """Log-probs of ``tokens`` given the last hidden states.

        out_n = token_logprob(hidden @ weight.T + bias)_n

    The fused kernel keeps the logits in float32; where torch multiplies, they have the dtype of
    the head, as the model defines it.

    Args:
        hidden: [N, D]. weight: [V, D], same dtype. bias: [V] or None, same dtype.
        tokens: int64 [N], ids below ``vocab_size``.
        softcap, scale, vocab_size: as in :func:`token_logprob`.

    Returns:
        float32 [N], in nats. At most a block of the [N, V] logits exists at a time.
    """
    check_shapes(hidden, weight, tokens, bias)
    logprobs: Tensor = _operator(hidden, weight, tokens, bias, softcap, scale, vocab_size)
    return logprobs


def check_shapes(hidden: Tensor, weight: Tensor, tokens: Tensor, bias: Tensor | None) -> None:
    """ValueError where they do not fit together."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be [N, D], [V, D]"
        )
    if tokens.shape != hidden.shape[:1] or not (bias is None or bias.shape == weight.shape[:1]):
        raise ValueError(
            f"tokens {tuple(tokens.shape)} must be [N] = [{len(hidden)}], bias [V] or None"
        )


def _torch(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    vocab_size: int | None,
) -> Tensor:
    size = _CUDA_BLOCK_BYTES if hidden.is_cuda else _BLOCK_BYTES
    rows = max(1, size // (4 * weight.shape[0]))
    # Blocks of equal size: a short last one would cost as much as a whole one.
    count = max(1, -(-len(tokens) // rows))
    blocks = [
        token_logprob(
            torch.nn.functional.linear(h, weight, bias),
            t,
            vocab_size=vocab_size,
            scale=scale,
            softcap=softcap,
        )
        for h, t in zip(hidden.tensor_split(count), tokens.tensor_split(count))
    ]
    return torch.cat(blocks)


def _fake(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    vocab_size: int | None,
) -> Tensor:
    return hidden.new_empty(tokens.shape[0], dtype=torch.float32)


def _triton(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    vocab_size: int | None,
) -> Tensor:
    if not is_fused(hidden, weight):
        return _torch(hidden, weight, tokens, bias, softcap, scale, vocab_size)
    return merge_splits(*split_vocabulary(hidden, weight, tokens, bias, softcap, scale, vocab_size))


def is_fused(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the fused kernel serves this product where Triton runs; else torch multiplies."""
    rows, width = hidden.shape
    served = hidden.dtype == weight.dtype and hidden.dtype in _SERVED
    return served and rows > 0 and not _product_pays(rows, width, hidden.element_size())


def _product_pays(rows: int, width: int, element_size: int) -> bool:
    """Whether torch's product and a one-pass gather are expected to beat the fused kernel.

    A wide product of many rows is bound by arithmetic, where cuBLAS is ahead, and a block of
    logits stays in the L2 cache; in float32 arithmetic is the bound far sooner. The thresholds
    are estimates until a benchmark replaces them.
    """
    if element_size == 4:
        return rows > 32
    return width >= 4096 and rows >= 128


class _Launch(NamedTuple):
    """A tile is [vocabulary, rows]; ``depth`` elements of D a step."""

    vocabulary: int
    rows: int
    depth: int
    num_warps: int
    num_stages: int


def _launch(on: Gpu, rows: int, element_size: int) -> _Launch:
    """Launch parameters: fixed by architecture, dtype and bucket of rows.

    On an H100, D = 768 and V = 50,257 in bfloat16 take 34, 37, 48 and 139 us for 16, 64, 128 and
    512 rows: at most 0.38 of torch's product alone (`python -m bench.kernels`).

    The vocabulary lies on the M side of the product: 16 rows would fill a quarter of a WGMMA's M
    of 64, as its N they are a whole instruction. 16 rows are bound by the weights' bytes, so
    stages are as many as leave room for two programs on a multiprocessor.
    """
    block = next((b for b in (16, 32, 64) if rows <= b), 128)
    if element_size == 4:  # float32 has no exact tensor-core product: small tiles, few registers
        return _Launch(vocabulary=64, rows=min(block, 32), depth=32, num_warps=4, num_stages=2)
    stages = 4 if on.arch >= 90 and block <= 64 else 3
    # Registers: with 4 warps and 64 rows, sm_100 came out at 255.
    warps = 8 if block == 128 or (on.arch >= 100 and block == 64) else 4
    return _Launch(128, block, depth=64, num_warps=warps, num_stages=stages)


def empty_partials(
    hidden: Tensor, weight: Tensor, vocab_size: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`split_vocabulary` fills: float32 [N, splits] twice, and [N]."""
    rows, vocab = hidden.shape[0], _vocabulary(weight, vocab_size)
    launch = _launch(gpu(hidden.device), rows, hidden.element_size())
    splits = -(-vocab // launch.vocabulary)
    return (
        hidden.new_empty((rows, splits), dtype=torch.float32),
        hidden.new_empty((rows, splits), dtype=torch.float32),
        hidden.new_empty(rows, dtype=torch.float32),
    )


def _vocabulary(weight: Tensor, vocab_size: int | None) -> int:
    return weight.shape[0] if vocab_size is None else min(vocab_size, weight.shape[0])


def split_vocabulary(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    vocab_size: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the product: the maximum and the sum of each split of a row, and the token's logit.

    For those that :func:`is_fused` says. NaN is the logit of a token that is no id.
    """
    rows, width = hidden.shape
    vocab = _vocabulary(weight, vocab_size)
    if hidden.stride(1) != 1:
        hidden = hidden.contiguous()
    if weight.stride(1) != 1:  # a copy of the head: correct, and slow
        weight = weight.contiguous()
    launch = _launch(gpu(hidden.device), rows, hidden.element_size())
    largest, total, target = empty_partials(hidden, weight, vocab_size)
    splits = largest.shape[1]
    _split_vocabulary[(-(-rows // launch.rows), splits)](
        hidden, weight, bias, tokens, largest, total, target,
        hidden.stride(0), weight.stride(0), width, rows, vocab, splits, scale, softcap or 0.0,
        SOFTCAP=softcap is not None, EVEN=width % launch.depth == 0,
        VOCABULARY=launch.vocabulary, ROWS=launch.rows, DEPTH=launch.depth,
        num_warps=launch.num_warps, num_stages=launch.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return largest, total, target


# hidden, weight, their strides and D are worth knowing to be multiples of 16, for vector loads.
# The rest varies with the number of rows.
@jit(
    do_not_specialize=[
        "tokens", "largest", "total", "target", "rows", "vocab_size", "splits",
    ]
)  # fmt: skip
def _split_vocabulary(
    hidden, weight, bias, tokens, largest, total, target,
    hidden_stride, weight_stride, width, rows, vocab_size, splits, scale, softcap,
    SOFTCAP: tl.constexpr, EVEN: tl.constexpr,
    VOCABULARY: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Program (row block, split): logits [VOCABULARY, ROWS] of one tile, then their partials.

    Row blocks vary fastest, so that programs which share a tile of the weights run side by side
    and read it from memory once.
    """
    # V * D may exceed 2^31 elements: where a tile begins is counted in 64 bits, and only what
    # lies inside of it in 32.
    split = tl.program_id(1)
    first_id = split * VOCABULARY
    first_row = tl.program_id(0) * ROWS
    weight += first_id.to(tl.int64) * weight_stride
    hidden += first_row.to(tl.int64) * hidden_stride
    v = tl.arange(0, VOCABULARY)
    n = tl.arange(0, ROWS)
    k = tl.arange(0, DEPTH)
    # Rows past the end repeat the last one and are left out below: the loads need no mask.
    v_read = tl.minimum(v, vocab_size - 1 - first_id)
    n_read = tl.minimum(n, rows - 1 - first_row)
    w_at = weight + v_read[:, None] * weight_stride + k[None, :]
    h_at = hidden + n_read[None, :] * hidden_stride + k[:, None]

    x = tl.zeros([VOCABULARY, ROWS], tl.float32)
    for d in range(0, width, DEPTH):
        if EVEN:
            w = tl.load(w_at)
            h = tl.load(h_at)
        else:
            w = tl.load(w_at, mask=d + k[None, :] < width, other=0.0)
            h = tl.load(h_at, mask=d + k[:, None] < width, other=0.0)
        x = tl.dot(w, h, x, input_precision="ieee")
        w_at += DEPTH
        h_at += DEPTH

    if bias is not None:
        x += tl.load(bias + first_id + v_read).to(tl.float32)[:, None]
    x = soften(x, scale, softcap, SOFTCAP)
    x = tl.where((first_id + v < vocab_size)[:, None], x, -float("inf"))

    m = tl.maximum(tl.max(x, 0), LOWEST)
    s = tl.sum(tl.exp(x - m[None, :]), 0)
    row = (first_row + n).to(tl.int64)
    inside = row < rows
    tl.store(largest + row * splits + split, m, mask=inside)
    tl.store(total + row * splits + split, s, mask=inside)

    # Exactly one element of all tiles is a row's token. A masked store of the tile takes fewer
    # registers than a sum over it would.
    token = tl.load(tokens + row, mask=inside, other=-1)
    last = tl.minimum(first_id + VOCABULARY, vocab_size)
    place = tl.where((token >= first_id) & (token < last), token - first_id, -1).to(tl.int32)
    own = target + first_row + tl.broadcast_to(n[None, :], [VOCABULARY, ROWS])
    tl.store(own, x, mask=v[:, None] == place[None, :])
    if split == 0:
        unknown = (token < 0) | (token >= vocab_size)
        tl.store(target + row, float("nan"), mask=inside & unknown)


_operator = register(
    "linear_logprob(Tensor hidden, Tensor weight, Tensor tokens, Tensor? bias, float? softcap,"
    " float scale, int? vocab_size) -> Tensor",
    torch_path=_torch,
    triton_path=_triton,
    fake=_fake,
)
