"""What the kernels of sample_tokens draw, beside what the definition draws from their weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tests.interpret.rule import DEVICE
from tests.kernels.warps import Warp, columns
from w2s_fast.kernels import sample_tokens_triton as module
from w2s_fast.kernels.library import jit, tl
from w2s_fast.kernels.noise import uniform
from w2s_fast.kernels.sample_tokens_search import integer_weight
from w2s_fast.kernels.sample_tokens_triton import Tiling

# So small that 100 tokens are several blocks, and that survivors of several sizes overflow.
SMALL = Tiling(block=64, group=8, capacity=32, listed=4, guess=4, search_block=32, pivots=4)


@jit
def weigh(logits, largest, temperature, weights, vocab, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    v = tl.arange(0, BLOCK)
    x = tl.load(logits + row * vocab + v, mask=v < vocab, other=-float("inf"))
    weight = integer_weight(x, tl.load(largest + row), tl.load(temperature + row))
    tl.store(weights + row * vocab + v, weight, mask=v < vocab)


def kernel_weights(logits: Tensor, temperature: Tensor) -> Tensor:
    """The integers that the kernels hold for [S, V] logits."""
    logits = logits.float().contiguous().to(DEVICE)
    rows, vocab = logits.shape
    weights = torch.empty(rows, vocab, dtype=torch.int64, device=DEVICE)
    block = 1 << (vocab - 1).bit_length()
    largest = logits.max(-1).values
    weigh[(rows,)](logits, largest, temperature.to(DEVICE), weights, vocab, BLOCK=block)
    return weights.cpu()


def tensors(warps: Sequence[Warp], seed: int) -> tuple[Tensor, ...]:
    rows = len(warps)
    return (
        *columns(warps),
        torch.full((rows,), seed),
        torch.arange(rows) % 3,
        torch.arange(rows),
    )


def defined(logits: np.ndarray, weights: list[int], warp: Warp, u: float) -> int:
    """The token of one row, from the definition, in Python's integers."""
    if not np.isfinite(logits.max()):
        return 0
    if warp.temperature == 0:
        return int(logits.argmax())
    if warp.top_k:
        kth = np.sort(logits)[::-1][min(warp.top_k, len(logits)) - 1]
        weights = [w if x >= kth else 0 for w, x in zip(weights, logits)]
    if warp.top_p < 1:
        needed = max(1, math.ceil(warp.top_p * float(sum(weights))))
        levels = sorted(set(weights), reverse=True)
        level = next(t for t in levels if sum(w for w in weights if w >= t) >= needed)
        weights = [w if w >= level else 0 for w in weights]
    least = math.ceil(warp.min_p * 2**40)
    weights = [w if w >= least else 0 for w in weights]
    target = min(int(u * float(sum(weights))), sum(weights) - 1)
    running = np.cumsum(np.array(weights, dtype=np.int64))
    return int(np.searchsorted(running, target, side="right"))


def launch(
    logits: Tensor, warps: Sequence[Warp], seed: int, tiling: Tiling | None = SMALL
) -> tuple[Tensor, Tensor]:
    on_device = (x.to(DEVICE) for x in tensors(warps, seed))
    tokens, logprobs = module.launch(logits.to(DEVICE), *on_device, tiling)  # type: ignore[misc]
    return tokens.cpu(), logprobs.cpu()


def check(
    logits: Tensor, warps: Sequence[Warp], seed: int = 0, tiling: Tiling | None = SMALL
) -> tuple[Tensor, Tensor]:
    tokens, logprobs = launch(logits, warps, seed, tiling)
    temperature, *_, seeds, candidate, position = tensors(warps, seed)
    weights = kernel_weights(logits, temperature).tolist()
    u = uniform(seeds, candidate, position).tolist()
    plain = logits.float().cpu()
    rows = plain.numpy()
    expected = [defined(x, w, warp, n) for x, w, warp, n in zip(rows, weights, warps, u)]
    assert tokens.tolist() == expected
    exact = plain.double().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    exact[~plain.max(-1).values.isfinite()] = math.nan
    torch.testing.assert_close(logprobs.double(), exact, atol=3e-6, rtol=1e-6, equal_nan=True)
    return tokens, logprobs
