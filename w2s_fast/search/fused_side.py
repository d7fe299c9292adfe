"""The fused side of the search: candidates grow by tokens that all models draw together.

Base and guides stand at the same position. A step runs all of them, fuses their logits and draws,
and keeps what each model says of what was drawn: so scores are known without another pass.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from w2s_fast._pages import fork_beams, lay_out_rows, release_finished, take_fused
from w2s_fast.attention import RowTree
from w2s_fast.decoding import Draws, FusedDecoder, FusedRows, FusionColumns, SamplingColumns
from w2s_fast.errors import NumericalError
from w2s_fast.models import PagedModel
from w2s_fast.search.base_side import BaseSide, Drawn
from w2s_fast.search.guide import Places
from w2s_fast.search.request import Request
from w2s_fast.search.sources import run_sources
from w2s_fast.stats import timed


class FusedSide:
    """Expands candidates in all models."""

    def __init__(
        self,
        base: BaseSide,
        models: Sequence[PagedModel],
        places: Sequence[Places],
        weights: Sequence[float],
        vocab_size: int,
    ) -> None:
        """Over the models of a search, the base first.

        Args:
            base: whose rows and passes are counted. places, weights: of the guides.
            vocab_size: ids from here on are padding.
        """
        self._base = base
        self._models = list(models)
        self._decoder = FusedDecoder(models, places, vocab_size)
        self._terms = [
            (weight, tuned, -1 if untuned is None else untuned)
            for weight, (tuned, untuned) in zip(weights, places)
        ]

    def draw(self, requests: Sequence[Request], steps: int) -> Drawn:
        """Sample the next ``steps`` tokens of every growing candidate; the host waits for none."""
        begun = [request for request in requests if request.begins]
        new = [request.stats for request in begun]
        old = [request.stats for request in requests if not request.begins]
        with timed("prefill_s", new), timed("decode_s", old):
            logits = self._first_logits(requests)
        with timed("decode_s", new + old):
            draws = self._decode(requests, logits, steps)
        return Drawn(list(requests), begun, draws)

    def take(self, drawn: Drawn, memory: Tensor) -> None:
        """Give candidates what was drawn for them, and its scores, up to where they end.

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
            name = self._models[model].name if model >= 0 else "what the base and its guides give"
            request = drawn.requests[index]
            request.error = request.error or NumericalError.at(name, position)
        self._remember([request for request in drawn.begun if request.error is None])
        for index, model_of in enumerate(self._models):
            release_finished(beams, model_of.pool.manager, index)

    def _first_logits(self, requests: Sequence[Request]) -> list[Tensor]:
        """Append what stands before the first tokens; every model's logits behind it."""
        found = []
        for index, model in enumerate(self._models):
            ran = run_sources(model, index, requests)
            found.append(self._decoder.logits(index, ran.hidden))
            if index == 0:
                self._base.rows += ran.rows
                self._base.passes += ran.passes
        return found

    def _decode(self, requests: Sequence[Request], logits: list[Tensor], steps: int) -> Draws:
        """Fork the sources, and sample all their children's tokens from ``logits`` on."""
        beams = [request.beams for request in requests]
        rows = []
        for index, model in enumerate(self._models):
            copies = fork_beams(beams, model.pool.manager, index)
            slots, sampling, tree, fusion = lay_out_rows(beams, index)
            rows.append(FusedRows(slots, RowTree(*tree), copies))
        self._base.rows += len(slots) * (steps - 1)
        self._base.passes += steps - 1
        return self._decoder.run(
            rows, SamplingColumns(*sampling), FusionColumns(*fusion), logits, steps
        )

    def _remember(self, requests: Sequence[Request]) -> None:
        """Let later requests find these prompts; not those that made a model fail."""
        if not requests:
            return
        for index, model in enumerate(self._models):
            # The first child has its parent's pages.
            slots = [request.beams.slot_of_first(index) for request in requests]
            model.pool.remember(slots, [request.prompts[index] for request in requests])
