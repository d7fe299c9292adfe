"""Sample one token a row: warp the logits, then invert the CDF exactly.

The warped distribution of a row is held as integers,

    weight_v = floor( 2^40 * exp((logit_v - max) / temperature) )    for allowed tokens, else 0,

and a token is found where the running sum of the weights in token-id order first exceeds
``floor(u * total)``. Sums of integers do not depend on their order, so for equal logits every block
size and batch gives the same token, and so does every device whose exp rounds alike; what the order
of a sum could move at the edge of top-p or at a tie cannot move here. Weights below 2^-40 of the
likeliest token's are zero.

A GPU's exp(x) is 2^(x * log2 e) with the product rounded, and its weights differ in their last bits
from a CPU's. Measured with that rounding, a draw without filters gives another token with
probability 3.5e-4 (V = 128,256, logits of standard deviation 4), 1.3e-4 (V = 50,257, the same), or
1e-5 to 2e-5 (flat rows); with top-k 50 hardly ever.

Warping, in this order, with ties always kept together (no order of equal tokens is better than
another): temperature; top-k keeps the tokens with logit >= the k-th largest; top-p keeps the
smallest set {weight >= t} whose sum is at least top_p of what top-k left; min-p keeps weights
>= min_p of the largest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from w2s_fast.kernels.library import register
from w2s_fast.kernels.noise import uniform
from w2s_fast.kernels.sample_tokens_triton import launch

WEIGHT_ONE = 2**40  # the likeliest token's weight; 2^22 tokens of it still fit in int64
FEW = 1024  # the largest top-k for which the CPU looks at the k largest logits only


def sample_tokens(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    candidate: Tensor,
    position: Tensor,
) -> tuple[Tensor, Tensor]:
    """Sample a token for each row; settings differ by row.

    Args:
        logits: [S, V] of any float dtype; -inf marks a token that is not allowed.
        temperature: float32 [S]; 0 takes the likeliest token (the lowest id at a tie).
        top_k: int64 [S]; 0 is off.
        top_p: float64 [S]; 1 is off.
        min_p: float64 [S]; 0 is off.
        seed, candidate, position: int64 [S], the key of the noise (:mod:`w2s_fast.kernels.noise`).

    Returns:
        tokens int64 [S], and their log-probs float32 [S] at temperature 1, before warping. The
        log-prob is NaN, and the token 0, where a row holds NaN or +inf or nothing but -inf.
    """
    result: tuple[Tensor, Tensor] = _operator(
        logits, temperature, top_k, top_p, min_p, seed, candidate, position
    )
    return result


def _torch(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    candidate: Tensor,
    position: Tensor,
) -> tuple[Tensor, Tensor]:
    logits = logits.float()
    largest, likeliest = logits.max(dim=-1)
    row_settings = (largest, temperature, top_k, top_p, min_p, uniform(seed, candidate, position))
    tokens = likeliest.clone()

    # A row with a small top-k, or a small nucleus, is decided among its largest logits alone.
    vocabulary = logits.shape[1]
    rest = temperature > 0
    for width in (0, FEW, 8 * FEW):
        if width == 0:
            masked = rest & (top_k > 0) & (top_k <= min(FEW, vocabulary // 8))
        else:
            masked = rest & (top_k == 0) & (top_p < 1) & (vocabulary > 4 * width)
        if (some := _rows(masked)) is not None:
            row = (x[some] for x in row_settings)
            tokens[some], exact = _draw_among_few(
                logits[some], width or int(top_k[some].max()) + 1, *row
            )
            rest[some] &= ~exact
    if (some := _rows(rest)) is not None:
        tokens[some] = _draw(logits[some], *(x[some] for x in row_settings))

    tokens = torch.where(largest.isfinite(), tokens, 0)
    logprobs = logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
    return tokens, torch.where(largest.isfinite(), logprobs, torch.nan)


def _rows(mask: Tensor) -> Tensor | slice | None:
    """What to index the masked rows by. A slice for all of them: it does not copy the logits."""
    if bool(mask.all()):
        return slice(None)
    return mask.nonzero()[:, 0] if bool(mask.any()) else None


def _draw(
    logits: Tensor,
    largest: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    u: Tensor,
) -> Tensor:
    """Tokens int64 [S], straight from the definition."""
    weights = _weights(logits, largest, temperature)
    weights = _keep_top_k(weights, logits, top_k)
    if bool((top_p < 1).any()):
        # With top-k in every row, only that many weights can be nonzero, ties with the k-th apart:
        # those all are, or all are not, above the threshold, so the k largest decide.
        bound = int(top_k.max()) if bool((top_k > 0).all()) else logits.shape[1]
        ordered = weights.topk(min(bound, logits.shape[1]), dim=-1).values
        level = _level_of_top_p(ordered, weights.sum(-1), top_p)
        weights = weights * (weights >= level)
    weights = _keep_min_p(weights, min_p)
    return _invert_cdf(weights, u)


def _draw_among_few(
    logits: Tensor,
    width: int,
    largest: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    u: Tensor,
) -> tuple[Tensor, Tensor]:
    """The same from the ``width`` largest logits of a row, and a mask of the rows it is right for.

    top_k has to be below ``width`` in all rows, or 0 in all. It is not right where the k-th
    largest may tie with tokens that were left out, or where the nucleus may hold such tokens.
    """
    values, ids = logits.topk(width, dim=-1)
    weights = _weights(values, largest, temperature)
    has_top_k = bool((top_k > 0).all())
    if has_top_k:
        kth = values.gather(-1, top_k[:, None] - 1)
        exact = (values[:, -1] < kth[:, 0]) | (kth[:, 0] == -torch.inf)
        weights = weights * (values >= kth)
        total = weights.sum(-1)
    else:
        total = _weights(logits, largest, temperature).sum(-1)
    if bool((top_p < 1).any()):
        level = _level_of_top_p(weights.sort(-1, descending=True).values, total, top_p)
        if not has_top_k:  # left-out weights are at most the last one, exp's rounding granted
            exact = weights[:, -1] * 1.00001 + 1 < level[:, 0]
        weights = weights * (weights >= level)
    ids, order = ids.sort(dim=-1)
    weights = _keep_min_p(weights.gather(-1, order), min_p)
    found = _invert_cdf(weights, u).clamp(max=width - 1)  # a broken row may point anywhere
    return ids.gather(-1, found[:, None])[:, 0], exact


def _invert_cdf(weights: Tensor, u: Tensor) -> Tensor:
    cdf = weights.cumsum(-1)
    total = cdf[:, -1]
    target = torch.minimum((u * total.double()).long(), total - 1)
    return torch.searchsorted(cdf, target[:, None], right=True)[:, 0]


def _weights(logits: Tensor, largest: Tensor, temperature: Tensor) -> Tensor:
    # Greedy rows are replaced later: any finite divisor does for them.
    divisor = torch.where(temperature > 0, temperature, 1.0)[:, None]
    scaled = (logits - largest[:, None]).div_(divisor)
    return scaled.exp_().mul_(WEIGHT_ONE).long()  # exp of float32 times 2^40 is exact in float32


def _keep_top_k(weights: Tensor, logits: Tensor, top_k: Tensor) -> Tensor:
    vocabulary = logits.shape[-1]
    largest_k = min(int(top_k.max()), vocabulary)
    if largest_k == 0:
        return weights
    # Off (0) reads the last column and is then let through.
    column = (top_k.clamp(max=largest_k) - 1).clamp(min=0)
    kth = logits.topk(largest_k, dim=-1).values.gather(-1, column[:, None])
    return weights * ((logits >= kth) | (top_k == 0)[:, None])


def _level_of_top_p(ordered: Tensor, total: Tensor, top_p: Tensor) -> Tensor:
    """The least weight [S, 1] that top-p keeps; 0 where it is off.

    ``ordered`` [S, N]: descending weights; where they do not reach top_p of ``total``, the last.
    """
    needed = (top_p * total.double()).ceil().long().clamp(min=1)
    last = torch.searchsorted(ordered.cumsum(-1), needed[:, None])
    level = ordered.gather(-1, last.clamp(max=ordered.shape[-1] - 1))
    return torch.where(top_p[:, None] < 1, level, 0)


def _keep_min_p(weights: Tensor, min_p: Tensor) -> Tensor:
    if bool((min_p <= 0).all()):
        return weights
    threshold = (min_p * WEIGHT_ONE).ceil().long()[:, None]
    return weights * (weights >= threshold)


def _fake(logits: Tensor, *settings: Tensor) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    return (
        logits.new_empty(rows, dtype=torch.int64),
        logits.new_empty(rows, dtype=torch.float32),
    )


_operator = register(
    "sample_tokens(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p,"
    " Tensor seed, Tensor candidate, Tensor position) -> (Tensor, Tensor)",
    torch_path=_torch,
    triton_path=launch,
    fake=_fake,
)
