"""Sample one token a row: warp the logits, then invert the CDF exactly.

The warped distribution of a row is held as integers,

    weight_v = floor( 2^40 * exp((logit_v - max) / temperature) )    for allowed tokens, else 0,

and a token is found where the running sum of the weights in token-id order first exceeds
``floor(u * total)``. Sums of integers do not depend on their order, so every device, block size
and batch gives the same token for equal logits; what float rounding could move at the edge of
top-p or at a tie cannot move here. Weights below 2^-40 of the likeliest token's are zero.

Warping, in this order, with ties always kept together (no order of equal tokens is better than
another): temperature; top-k keeps the tokens with logit >= the k-th largest; top-p keeps the
smallest set {weight >= t} whose sum is at least top_p of what top-k left; min-p keeps weights
>= min_p of the largest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from w2s_fast.kernels.noise import uniform

WEIGHT_ONE = 2**40  # the likeliest token's weight; 2^22 tokens of it still fit in int64


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
    logits = logits.float()
    largest, likeliest = logits.max(dim=-1)
    weights = _weights(logits, largest, temperature)
    weights = _keep_top_k(weights, logits, top_k)
    weights = _keep_top_p(weights, top_k, top_p)
    weights = _keep_min_p(weights, min_p)

    cdf = weights.cumsum(-1)
    total = cdf[:, -1]
    u = uniform(seed, candidate, position)
    target = torch.minimum((u * total.double()).long(), total - 1)
    sampled = torch.searchsorted(cdf, target[:, None], right=True)[:, 0]

    tokens = torch.where(temperature == 0, likeliest, sampled)
    tokens = torch.where(largest.isfinite(), tokens, 0)
    logprobs = logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
    return tokens, torch.where(largest.isfinite(), logprobs, torch.nan)


def _weights(logits: Tensor, largest: Tensor, temperature: Tensor) -> Tensor:
    # Greedy rows are replaced later: any finite divisor does for them.
    divisor = torch.where(temperature > 0, temperature, 1.0)[:, None]
    scaled = (logits - largest[:, None]) / divisor
    return (scaled.exp_() * WEIGHT_ONE).long()  # exp of float32 times 2^40 is exact in float32


def _keep_top_k(weights: Tensor, logits: Tensor, top_k: Tensor) -> Tensor:
    vocabulary = logits.shape[-1]
    largest_k = min(int(top_k.max()), vocabulary)
    if largest_k == 0:
        return weights
    # Off (0) reads the last column and is then let through.
    column = (top_k.clamp(max=largest_k) - 1).clamp(min=0)
    kth = logits.topk(largest_k, dim=-1).values.gather(-1, column[:, None])
    return weights * ((logits >= kth) | (top_k == 0)[:, None])


def _keep_top_p(weights: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    if bool((top_p >= 1).all()):
        return weights
    total = weights.sum(-1, dtype=torch.int64)
    # With top-k in every row, only that many weights can be nonzero, ties with the k-th apart:
    # those all are, or all are not, above the threshold, so the k largest decide.
    bound = int(top_k.max()) if bool((top_k > 0).all()) else weights.shape[-1]
    ordered = weights.topk(min(bound, weights.shape[-1]), dim=-1).values
    mass = ordered.cumsum(-1)
    needed = (top_p * total.double()).ceil().long().clamp(min=1)
    last = torch.searchsorted(mass, needed[:, None]).clamp(max=ordered.shape[-1] - 1)
    threshold = ordered.gather(-1, last)
    return weights * ((weights >= threshold) | (top_p >= 1)[:, None])


def _keep_min_p(weights: Tensor, min_p: Tensor) -> Tensor:
    if bool((min_p <= 0).all()):
        return weights
    threshold = (min_p * WEIGHT_ONE).ceil().long()[:, None]
    return weights * (weights >= threshold)
