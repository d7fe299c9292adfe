"""The candidates of many requests as tensors, and back: what select_beams is given and answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from w2s_fast._pages import Beams, lay_out_candidates
from w2s_fast.cache import Int32Array
from w2s_fast.kernels.select_beams import select_beams


class Choice(NamedTuple):
    """What a selection of R requests with C candidates and T new tokens found, on the host.

    Attributes:
        token_scores: float64 [T].
        scores: float64 [C], each candidate's sum over its whole response.
        kept: int32 [R, W], indices of a request's candidates, best first; -1 where it has no more.
        broken: int32 [C], each candidate's first new token, as an index into T, whose score is not
            finite; -1 if all are.
    """

    token_scores: NDArray[np.float64]
    scores: NDArray[np.float64]
    kept: Int32Array
    broken: Int32Array


def choose(
    requests: Sequence[Beams],
    tokens: Tensor,
    tuned: Tensor,
    untuned: Tensor,
    weights: Sequence[float],
) -> Choice:
    """Score and rank all candidates of all requests in one call of the operator.

    Args:
        requests: each with a complete round.
        tokens: int64 [T], the new tokens of every candidate.
        tuned, untuned: float32 [guides, T], log-probs of those tokens.
        weights: of the guides.
    """
    device = tuned.device

    def column(values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(values).to(device, non_blocking=True)

    columns, max_candidates, max_width = lay_out_candidates(requests)
    found = select_beams(
        tuned,
        untuned,
        column(np.array(weights, np.float64)),
        tokens,
        **{name: column(values) for name, values in columns.items()},
        max_candidates=max_candidates,
        max_width=max_width,
    )
    return Choice(
        *(x.cpu().numpy() for x in (found.token_scores, found.scores, found.kept, found.broken))
    )
