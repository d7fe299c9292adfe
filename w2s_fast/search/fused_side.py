"""The fused side of the search: candidates grow by tokens that all models draw together.

Base and guides stand at the same position. A step runs all of them, fuses their logits and draws,
and keeps what each model says of what was drawn: so scores are known without another pass.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from w2s_fast._pages import release_finished, take_fused
from w2s_fast.decoding import DecodeGraphs, Decoder
from w2s_fast.errors import NumericalError
from w2s_fast.models import PagedModel
from w2s_fast.search.endings import end_texts
from w2s_fast.search.expansion import Drawn, Expansion
from w2s_fast.search.guide import Roles
from w2s_fast.search.request import Request


class FusedSide:
    """Expands candidates in all models."""

    def __init__(
        self,
        models: Sequence[PagedModel],
        roles: Sequence[Roles],
        weights: Sequence[float],
        vocab_size: int,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        """Over the models of a search, the base first.

        Args:
            roles, weights: of the guides. vocab_size: ids from here on are padding.
            graphs: recorded steps of all models together.
        """
        self._models = list(models)
        self.expansion = Expansion(Decoder(models, vocab_size, graphs, roles))
        self._terms = [
            (weight, tuned, -1 if untuned is None else untuned)
            for weight, (tuned, untuned) in zip(weights, roles)
        ]

    def draw(self, requests: Sequence[Request], steps: int) -> Drawn:
        """Sample the next ``steps`` tokens of every growing candidate; the host waits for none."""
        return self.expansion.draw(requests, steps)

    def take(self, drawn: Drawn, memory: Tensor) -> None:
        """Give candidates what was drawn for them, and its scores, up to where they or their chunks
        end.

        A request in which a model produced NaN or infinity gets its ``error``.

        Args:
            memory: of the draws, on the host.
        """
        draws = drawn.draws
        beams = [request.beams for request in drawn.requests]
        for index, model, position in take_fused(
            beams,
            memory.numpy(),
            draws.rows,
            draws.logprobs_at,
            draws.others_at,
            draws.models,
            draws.room,
            self._terms,
        ):
            name = self._models[model].name if model >= 0 else "base and guides, fused"
            request = drawn.requests[index]
            request.error = request.error or NumericalError.at(name, position)
        self._remember([request for request in drawn.begun if request.error is None])
        end_texts(drawn.requests)
        for m, pool in enumerate(model.pool for model in self._models):
            release_finished(beams, pool.manager, m)

    def _remember(self, requests: Sequence[Request]) -> None:
        """Let later requests find these prompts; not those that made a model fail."""
        if not requests:
            return
        for index, model in enumerate(self._models):
            # The first child has its parent's pages.
            slots = [request.beams.slot_of_first(index) for request in requests]
            model.pool.remember(slots, [request.prompts[index] for request in requests])
