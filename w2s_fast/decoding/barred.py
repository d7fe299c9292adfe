"""Tokens that rows may not draw yet: those that would end a response too soon."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Barred:
    """For rows whose responses have to grow to some length before they may end."""

    def __init__(
        self,
        rows: Sequence[int],
        least: Sequence[int],
        ids: Sequence[Sequence[int]],
        position: NDArray[np.int64],
    ) -> None:
        """Of groups of neighbouring rows, which are all that are drawn for.

        Args:
            rows: of each group. least: tokens of a response before one of ``ids`` may come.
            position: int64 [S], of each row's next token.
        """
        ends = np.cumsum(rows)
        pairs = [
            (row, token, bound)
            for end, count, bound, own in zip(ends.tolist(), rows, least, ids)
            for row in range(end - count, end)
            if position[row] < bound
            for token in own
        ]
        self._pairs = np.array(pairs, np.int64).reshape(-1, 3)
        self._position = position.copy()  # its owner moves on by itself

    def bar(self, logits: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The base's logits of step ``step`` [S, V], without what is barred then.

        Returns:
            The logits, and float32 [S] to be added to the log-probs of what is drawn from them: the
            base's own are those of all tokens.
        """
        rows, ids, _ = self._pairs[self._position[self._pairs[:, 0]] + step < self._pairs[:, 2]].T
        barred = logits.clone()
        at = [torch.from_numpy(own.copy()).to(logits.device) for own in (rows, ids)]
        barred[at[0], at[1]] = -torch.inf
        return barred, barred.float().logsumexp(1) - logits.float().logsumexp(1)
