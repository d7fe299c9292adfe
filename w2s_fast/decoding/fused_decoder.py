"""FusedDecoder: rows grow by tokens that several models draw together, a step after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from w2s_fast.attention import RowTree
from w2s_fast.cache import Int32Array
from w2s_fast.decoding.decoding import Decoding
from w2s_fast.decoding.draws import Draws
from w2s_fast.decoding.fusion import FusionColumns, GuidePlaces
from w2s_fast.decoding.sampling import SamplingColumns
from w2s_fast.models import PagedModel


class FusedRows(NamedTuple):
    """S rows in one model.

    Attributes:
        slots: int32 [S]. tree: what they share.
        copies: pages to be copied before the second step; see :meth:`PagePool.copy_pages`.
    """

    slots: Int32Array
    tree: RowTree
    copies: Int32Array


class FusedDecoder:
    """Samples from several models at once. All rows stand at the same position in each of them."""

    def __init__(
        self, models: Sequence[PagedModel], guides: GuidePlaces, vocab_size: int
    ) -> None:
        """``models``: the base first. ``vocab_size``: ids from here on are never sampled."""
        self._models = list(models)
        self._guides = list(guides)
        self._vocab_size = vocab_size

    def logits(self, model: int, hidden: Tensor) -> Tensor:
        """Hidden states [N, D] of one model -> logits [N, vocab_size]."""
        return self._models[model].logits(hidden)[:, : self._vocab_size]

    def run(
        self,
        rows: Sequence[FusedRows],
        sampling: SamplingColumns,
        fusion: FusionColumns,
        logits: Sequence[Tensor],
        steps: int,
    ) -> Draws:
        """Draw ``steps`` tokens for each row; all but the last stand in the KV then.

        Args:
            rows: the same S in each model. sampling, fusion: their settings.
            logits: of each model [S, V], from which the first tokens are drawn.

        Returns:
            What each step drew, on the device: nothing has been waited for.

        Raises:
            OutOfPages: there is no room for so many tokens.
        """
        base = self._models[0]
        decodings = [
            Decoding(model, own.slots, steps - 1, own.tree)
            for model, own in zip(self._models, rows)
        ]
        for model, own in zip(self._models, rows):
            model.pool.copy_pages(own.copies)
        settings, fuse = sampling.to(base.device), fusion.to(base.device)
        count = len(rows[0].slots)
        drawn = Draws.empty(steps, count, base.device, models=len(self._models) - 1)
        drawn.put(0, *fuse.draw(logits, self._guides, settings))
        for step in range(1, steps):
            settings.advance()
            last = drawn.tokens[step - 1]
            logits = [self.logits(m, own.step(last)) for m, own in enumerate(decodings)]
            drawn.put(step, *fuse.draw(logits, self._guides, settings))
        return drawn
