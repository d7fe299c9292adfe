"""The selection of many rounds at once: what score_select answers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from w2s_fast._pages import any_broken
from w2s_fast.search.guide import GuidePartials


class Selection(NamedTuple):
    """A selection that was launched, of R rounds with C candidates and T new tokens.

    Attributes:
        packed: int64, on the device: all that the host has to know; see ScoreSelection. Of one
            that was replayed it is overwritten by the next.
        shape: R, C, T and W that it has room for.
        cu_tokens: int64 [C + 1], on the host: where each candidate's new tokens begin.
        guides: what their models left of the log-probs of those tokens; None: it was replayed.
    """

    packed: Tensor
    shape: tuple[int, int, int, int]
    cu_tokens: NDArray[np.int64]
    guides: list[GuidePartials] | None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """How many are kept in all, C and T: what csrc is told of ``packed``."""
        rounds, candidates, tokens, width = self.shape
        return rounds * width, candidates, tokens

    def to_be_repeated(self, words: NDArray[np.int64]) -> bool:
        """Whether more has to be known, of scores that are not finite, than stands in ``packed``.

        They may be so by a token behind an end: attention multiplies what stands at later places by
        zero, and zero times NaN is NaN. Else somebody has to say which model they come from.

        Args:
            words: ``packed``, on the host.
        """
        used = len(self.cu_tokens) - 1
        if not any_broken(words, *self.sizes, used):
            return False
        kept, candidates, _ = self.sizes
        counts = words[2 * kept + candidates :][:used]
        return self.guides is None or bool((counts < np.diff(self.cu_tokens)).any())

    def kept(self, words: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [R, W]: indices of a round's candidates, best first; -1 where it has no more."""
        rounds, _, _, width = self.shape
        return words[: rounds * width].reshape(rounds, width)
