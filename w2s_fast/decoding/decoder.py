"""Decoder: rows grow by several sampled tokens, and the host looks at none of them.

One model draws, or several that stand at the same positions draw together.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from w2s_fast._pages import DrawLayout
from w2s_fast.attention import brought
from w2s_fast.decoding.barred import Barred
from w2s_fast.decoding.decode_graphs import DecodeGraphs
from w2s_fast.decoding.decoding import Decoding
from w2s_fast.decoding.drawing import Drawing
from w2s_fast.decoding.draws import Draws
from w2s_fast.decoding.fusion import FusionColumns, GuideRoles
from w2s_fast.decoding.growing_rows import GrowingRows
from w2s_fast.decoding.lane import Lane
from w2s_fast.decoding.sampling import SamplingColumns
from w2s_fast.models import Groups, PagedModel


class Decoder:
    """Samples a step after the other, replayed from graphs where there are any."""

    def __init__(
        self,
        models: Sequence[PagedModel],
        vocab_size: int,
        graphs: DecodeGraphs | None = None,
        guides: GuideRoles = (),
    ) -> None:
        """Of models that draw together, the base first.

        Args:
            vocab_size: ids from here on are padding and never sampled.
            graphs: recorded steps of these models.
            guides: of which the logits are fused; none where the base draws alone.
        """
        self.models = list(models)
        self.graphs = graphs
        bodies = [model.view.base_model for model in models]
        self._groups = Groups(self.models)
        self._drawing = Drawing(self._groups, bodies, guides, vocab_size, Lane(models[0].device))

    def logits(self, model: int, hidden: Tensor) -> Tensor:
        """Hidden states [N, D] of one model -> logits [N, vocab_size], on its device."""
        return self._drawing.logits(model, hidden)

    def _step(self, decodings: Sequence[Decoding], tokens: Tensor) -> list[Tensor]:
        """Append tokens int64 [S] in each model: last hidden states [S, D] of each, where it is."""
        found: list[list[Tensor]] = []
        for members, together in zip(self._groups.members, self._groups.together):
            own = [decodings[m] for m in members]
            there = brought(tokens, self.models[members[0]].device)
            if together is None or len(own) * len(tokens) > together.most_tokens:
                found.append([decoding.step(there) for decoding in own])
                continue
            plans = [decoding.next_plan() for decoding in own]
            found.append(together.run([there] * len(own), plans))
            for decoding in own:
                decoding.count(1)
        return self._groups.in_order(found)

    def begin(self, layout: DrawLayout, steps: int) -> Draws | None:
        """All of a draw at once, where it is replayed; see :meth:`DecodeGraphs.begin`."""
        return None if self.graphs is None else self.graphs.begin(layout, steps)

    def run(
        self,
        rows: Sequence[GrowingRows],
        sampling: SamplingColumns,
        fusion: FusionColumns | None,
        logits: Sequence[Tensor],
        steps: int,
        barred: Barred | None = None,
    ) -> Draws:
        """Draw ``steps`` tokens for each row; all but the last stand in the KV then.

        Args:
            rows: the same S in each model.
            sampling: their settings. fusion: those of models that draw together.
            logits: of each model [S, V], on its device, from which the first tokens are drawn.
            barred: what some of these rows may not draw yet; no recording serves that.

        Returns:
            What each step drew, on the base's device: nothing has been waited for, but for what is
            run on a CPU.

        Raises:
            OutOfPages: there is no room for so many tokens.
        """
        decodings = [
            Decoding(model, own.slots, steps - 1, own.tree) for model, own in zip(self.models, rows)
        ]
        if steps > 1 and self.graphs is not None and barred is None:
            replayed = self.graphs.run(rows, sampling, fusion, logits, steps)
            if replayed is not None:
                for decoding in decodings:
                    decoding.count(steps - 1)
                return replayed
        for model, own in zip(self.models, rows):
            model.pool.copy_pages(own.copies)
        device = self.models[0].device
        settings, fuse = sampling.to(device), None if fusion is None else fusion.to(device)
        drawn = Draws.empty(steps, len(rows[0].slots), device, len(self.models) - 1)
        for step in range(steps):
            if step > 0:
                settings.advance()
                last = drawn.tokens[step - 1]
                hidden = self._step(decodings, last)
                logits = [self.logits(m, own) for m, own in enumerate(hidden)]
            missing: Tensor | None = None
            if barred is not None:
                base, missing = barred.bar(logits[0], step)
                logits = [base, *logits[1:]]
            draw, others = self._drawing.draw_from(logits, settings, fuse)
            if missing is not None:
                draw = draw._replace(logprobs=draw.logprobs + missing)
            drawn.put(step, draw, others)
            self.models[0].agree(drawn.memory[step])
        return drawn
