"""Decoder: rows of the base grow by several sampled tokens, and the host looks at none of them."""

from __future__ import annotations

from torch import Tensor

from w2s_fast._pages import DrawLayout
from w2s_fast.attention import RowTree
from w2s_fast.cache import NO_COPIES, Int32Array, Ints
from w2s_fast.decoding.decode_graphs import DecodeGraphs
from w2s_fast.decoding.decoding import Decoding
from w2s_fast.decoding.draws import Draws
from w2s_fast.decoding.sampling import SamplingColumns
from w2s_fast.models import PagedModel


class Decoder:
    """Samples from one model, a step after the other, replayed from graphs where there are any."""

    def __init__(
        self, model: PagedModel, vocab_size: int, graphs: DecodeGraphs | None = None
    ) -> None:
        """``vocab_size``: ids from here on are padding and never sampled."""
        self.model = model
        self.graphs = graphs
        self._vocab_size = vocab_size

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [N, D] -> logits [N, vocab_size]."""
        return self.model.logits(hidden)[:, : self._vocab_size]

    def begin(self, layout: DrawLayout, steps: int) -> Draws | None:
        """All of a draw at once, where it is replayed; see :meth:`DecodeGraphs.begin`."""
        return None if self.graphs is None else self.graphs.begin(layout, steps)

    def run(
        self,
        slots: Ints,
        tree: RowTree,
        sampling: SamplingColumns,
        logits: Tensor,
        steps: int,
        copies: Int32Array = NO_COPIES,
    ) -> Draws:
        """Draw ``steps`` tokens for each slot; all but the last stand in the KV then.

        Args:
            slots: S slots. tree: what they share.
            sampling: settings of S rows.
            logits: [S, V], from which the first tokens are drawn.
            copies: pages to be copied before the second step; see :meth:`PagePool.copy_pages`.

        Returns:
            What each step drew, on the device: nothing has been waited for.

        Raises:
            OutOfPages: there is no room for so many tokens; nothing has changed.
        """
        decoding = Decoding(self.model, slots, steps - 1, tree)
        if steps > 1 and self.graphs is not None:
            replayed = self.graphs.run(slots, tree, sampling, logits, steps, copies)
            if replayed is not None:
                decoding.count(steps - 1)
                return replayed
        self.model.pool.copy_pages(copies)
        settings = sampling.to(self.model.device)
        drawn = Draws.empty(steps, len(slots), self.model.device)
        drawn.put(0, settings.draw(logits))
        for step in range(1, steps):
            settings.advance()
            hidden = decoding.step(drawn.tokens[step - 1])
            drawn.put(step, settings.draw(self.logits(hidden)))
        return drawn
