"""Sources: what a model runs before tokens are drawn for the candidates that come from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from w2s_fast._pages import lay_out_sources
from w2s_fast.attention import RowTree, to_device
from w2s_fast.models import PagedModel, forward_in_passes
from w2s_fast.search.request import Request


class Ran(NamedTuple):
    """Sources of requests that were run.

    Attributes:
        ends: last hidden states [N, D], a row for each source.
        source: int64 [S], of which source each candidate is that goes on from one.
        rows, passes: that were run for it.
    """

    ends: Tensor
    source: Tensor
    rows: int
    passes: int


def run_sources(model: PagedModel, index: int, requests: Sequence[Request]) -> Ran:
    """Append what stands before the next tokens of all growing candidates.

    All children of a beam come from one row: what they share is run once.

    Args:
        index: the model's, among those of a request's beams.
    """
    slots, counts, children, tokens, tree = lay_out_sources(
        [request.beams for request in requests], model.pool.manager, index
    )
    last = np.cumsum(counts, dtype=np.int64) - 1
    there = to_device(
        {"last": last, "source": np.repeat(np.arange(len(slots)), children)}, model.device
    )
    ends = []
    rows = 0
    for part, hidden in forward_in_passes(model, slots, tokens, counts, RowTree(*tree)):
        begin = part.tokens.start
        own = slice(*np.searchsorted(last, (begin, part.tokens.stop)))
        wanted = there["last"][own]
        ends.append(hidden.index_select(0, wanted - begin if begin else wanted))
        rows += len(part.counts)
    found = torch.cat(ends) if len(ends) > 1 else ends[0]
    return Ran(found, there["source"], rows, len(ends))
