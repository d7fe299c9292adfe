"""Decoder: rows of the base grow by several sampled tokens, and the host looks at none of them."""

from __future__ import annotations

from torch import Tensor

from w2s_fast.attention import RowTree
from w2s_fast.cache import Ints
from w2s_fast.decoding.decode_graphs import DecodeGraphs
from w2s_fast.decoding.decoding import Decoding
from w2s_fast.decoding.sampling import Draw, SamplingBatch
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

    def run(
        self, slots: Ints, tree: RowTree, sampling: SamplingBatch, logits: Tensor, steps: int
    ) -> list[Draw]:
        """Draw ``steps`` tokens for each slot; all but the last stand in the KV then.

        Args:
            slots: S slots. tree: what they share.
            sampling: settings of S rows; it is moved on.
            logits: [S, V], from which the first tokens are drawn.

        Returns:
            What each step drew, on the device: nothing has been waited for.

        Raises:
            OutOfPages: there is no room for so many tokens; nothing has changed.
        """
        decoding = Decoding(self.model, slots, steps - 1, tree)
        drawn = [sampling.draw(logits)]
        sampling.advance()
        if steps > 1 and self.graphs is not None:
            replayed = self.graphs.run(decoding.plan, sampling, drawn[0].tokens, steps - 1)
            if replayed is not None:
                decoding.count(steps - 1)
                return drawn + replayed
        for _ in range(steps - 1):
            drawn.append(sampling.draw(self.logits(decoding.step(drawn[-1].tokens))))
            sampling.advance()
        return drawn
