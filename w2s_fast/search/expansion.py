"""Expansion: growing candidates get tokens, drawn by one model or by several together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from w2s_fast._pages import DrawLayout, fork_beams, growing, lay_out_rows
from w2s_fast.attention import RowTree
from w2s_fast.decoding import Barred, Decoder, Draws, FusionColumns, GrowingRows, SamplingColumns
from w2s_fast.search.request import Request
from w2s_fast.search.sources import run_sources
from w2s_fast.stats import timed


class Drawn(NamedTuple):
    """Tokens that were drawn, on the device.

    Attributes:
        requests: whose growing candidates they belong to. begun: those of them whose prompt was
            run for it.
        draws: a step after the other, a row for each of those candidates.
    """

    requests: list[Request]
    begun: list[Request]
    draws: Draws


class Decoded(NamedTuple):
    """What decoding passes of the base have run."""

    rows: int
    passes: int


class Expansion:
    """Draws tokens for candidates, in slots of the models that draw.

    Attributes:
        rows, passes: of all decoding passes of the first of these models, so far.
    """

    def __init__(self, decoder: Decoder) -> None:
        """``decoder``: of the first models of a request's beams."""
        self.decoder = decoder
        self.rows = 0
        self.passes = 0
        self._models = decoder.models
        self._managers = [model.pool.manager for model in self._models]

    def draw(self, requests: Sequence[Request], steps: int) -> Drawn:
        """Sample the next ``steps`` tokens of every growing candidate; the host waits for none."""
        begun = [request for request in requests if request.begins]
        new = [request.stats for request in begun]
        first = set(begun)
        old = [request.stats for request in requests if request not in first]
        beams = [request.beams for request in requests]
        layout = DrawLayout(beams, self._managers)
        # The first token of all children of a beam comes from one row of logits, and only then
        # are they forked: what they share is forwarded once.
        barred = any(r.ends_late and r.params.min_new_tokens > r.beams.grown for r in requests)
        with timed("decode_s", old, begun=new):
            # Tokens that may not be drawn yet are barred where the host launches every step.
            draws = None if barred else self.decoder.begin(layout, steps)
            if draws is None:
                logits = self.first_logits(requests)
        if draws is None:
            with timed("decode_s", new + old):
                draws = self._decode(requests, logits, steps, barred)
        else:
            self.rows += layout.num_sources + layout.rows * (steps - 1)
            self.passes += steps
        return Drawn(list(requests), begun, draws)

    def first_logits(self, requests: Sequence[Request]) -> list[Tensor]:
        """Append what stands before the first tokens; each model's logits behind it."""
        found = []
        for index, model in enumerate(self._models):
            ran = run_sources(model, index, requests)
            found.append(self.decoder.logits(index, ran.ends).index_select(0, ran.source))
            if index == 0:
                self.rows += ran.rows
                self.passes += ran.passes
        return found

    def _decode(
        self, requests: Sequence[Request], logits: Sequence[Tensor], steps: int, barred: bool
    ) -> Draws:
        """Fork the sources, and sample all their children's tokens from ``logits`` on.

        ``barred``: some of them may not end yet.
        """
        beams, rows = [request.beams for request in requests], []
        for index, manager in enumerate(self._managers):
            copies = fork_beams(beams, manager, index)
            slots, sampling, tree, fusion = lay_out_rows(beams, index)
            rows.append(GrowingRows(slots, RowTree(*tree), copies))
        self.rows += len(slots) * (steps - 1)
        self.passes += steps - 1
        return self.decoder.run(
            rows,
            SamplingColumns(*sampling),
            FusionColumns(*fusion) if len(fusion[0]) else None,
            logits,
            steps,
            None if not barred else _too_soon(requests, sampling[-1]),
        )


def _too_soon(requests: Sequence[Request], position: NDArray[np.int64]) -> Barred:
    """What their growing candidates, whose next tokens have these positions, may not end with."""
    return Barred(
        growing([request.beams for request in requests]),
        [request.params.min_new_tokens for request in requests],
        [request.ended_by for request in requests],
        position,
    )
