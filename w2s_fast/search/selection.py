"""The selection of many rounds at once: what score_select is given, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from w2s_fast.kernels.score_select import ScoreSelection, score_select
from w2s_fast.search.guide import GuidePartials


class Choice(NamedTuple):
    """What a selection of R rounds with C candidates and T new tokens found, on the host.

    Attributes:
        token_scores: float64 [T].
        scores: float64 [C], each candidate's sum over its whole response.
        kept: int64 [R, W], indices of a round's candidates, best first; -1 where it has no more.
        counts: int64 [C], how many of each candidate's new tokens come before its end.
        broken: int64 [C], each candidate's first new token, as an index into T, whose score is not
            finite; -1 if all are.
    """

    token_scores: NDArray[np.float64]
    scores: NDArray[np.float64]
    kept: NDArray[np.int64]
    counts: NDArray[np.int64]
    broken: NDArray[np.int64]


class Selection(NamedTuple):
    """A selection that was launched.

    Attributes:
        packed: int64, on the device: all that the host has to know.
        shape: R, C, T and W.
        cu_tokens: int64 [C + 1], on the host: where each candidate's new tokens begin.
        guides: what their models left of the log-probs of those tokens.
    """

    packed: Tensor
    shape: tuple[int, int, int, int]
    cu_tokens: NDArray[np.int64]
    guides: list[GuidePartials]

    def may_be_spoilt(self, choice: Choice) -> bool:
        """Whether a score that is not finite may be so by a token behind an end.

        Attention multiplies what stands at later places by zero, and zero times NaN is NaN.
        """
        behind = choice.counts < np.diff(self.cu_tokens)
        return bool((choice.broken >= 0).any() and behind.any())

    def on_host(self, packed: Tensor) -> Choice:
        """From a copy of ``packed`` that the host has."""
        found = ScoreSelection.unpack(packed, *self.shape)
        columns = (found.token_scores, found.scores, found.kept, found.counts, found.broken)
        return Choice(*(column.numpy() for column in columns))


def select(
    guides: Sequence[GuidePartials],
    tokens: Tensor,
    logprobs: Tensor,
    weights: Tensor,
    columns: dict[str, Tensor],
    cu_tokens: NDArray[Any],
    max_candidates: int,
    max_width: int,
) -> Selection:
    """Launch the selection of many rounds in one call of the operator.

    Args:
        guides: what their models leave of the log-probs of ``tokens``.
        tokens, logprobs: int64 and float32 [T], new tokens as drawn from the base.
        weights: float64 [G].
        columns: of score_select from ``cu_tokens`` on, by name.
        cu_tokens: the same, on the host.
        max_candidates, max_width: as in score_select.
    """
    shape = (len(columns["width"]), len(columns["previous"]), len(tokens), max_width)
    packed = score_select(
        guides,
        weights,
        tokens,
        logprobs,
        **columns,
        max_candidates=max_candidates,
        max_width=max_width,
    )
    return Selection(packed, shape, cu_tokens, list(guides))
