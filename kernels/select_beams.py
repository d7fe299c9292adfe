"""Choose the best candidates of every request: one call for all requests of a round."""

from __future__ import annotations

import torch
from torch import Tensor


def select_beams(scores: Tensor, request: Tensor, width: Tensor, eligible: Tensor) -> Tensor:
    """The top ``width`` candidates of each request, best first; ties to the lower index.

    Args:
        scores: float64 [C], finite, candidates of one request side by side in their order.
        request: int64 [C], ascending from 0: which request a candidate belongs to.
        width: int64 [R], how many a request keeps at most.
        eligible: bool [C]; False never wins (a duplicate that is to be dropped).

    Returns:
        int64 [N]: indices into the C candidates, grouped by request, best first in each.
    """
    ranked = torch.where(eligible, scores, -torch.inf)
    order = ranked.argsort(descending=True, stable=True)
    order = order[request[order].argsort(stable=True)]  # by request, then score, then index
    start = torch.searchsorted(request, torch.arange(len(width), device=request.device))
    rank = torch.arange(len(order), device=order.device) - start[request[order]]
    return order[(rank < width[request[order]]) & eligible[order]]
