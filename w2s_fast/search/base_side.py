"""The base's side of the search: candidates grow by sampled tokens, in slots of the base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from w2s_fast._pages import (
    Beams,
    DrawLayout,
    fork_beams,
    held_slots,
    lay_out_rows,
    lay_out_sources,
    release_finished,
    take_selected,
    take_tokens,
)
from w2s_fast.attention import RowTree, to_device
from w2s_fast.decoding import DecodeGraphs, Decoder, Draws, SamplingColumns
from w2s_fast.errors import NumericalError
from w2s_fast.models import PagedModel, forward_in_passes
from w2s_fast.search.entrance import enter
from w2s_fast.search.request import Request
from w2s_fast.search.selection import Selection
from w2s_fast.stats import timed

_BASE = 0  # among the models of a request's beams


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


class BaseSide:
    """Expands candidates in the base.

    Attributes:
        rows, passes: of all decoding passes together.
    """

    def __init__(
        self, model: PagedModel, vocab_size: int, graphs: DecodeGraphs | None = None
    ) -> None:
        """``vocab_size``: ids from here on are padding. ``graphs``: decoding steps."""
        self.model = model
        self.decoder = Decoder(model, vocab_size, graphs)
        self.rows = 0
        self.passes = 0

    def enter(self, requests: Sequence[Request], most: list[int]) -> list[Request]:
        """Run what requests go on from: of new ones the prompt, of those set aside the hypotheses.

        What is left of a new prompt, its last token at least, runs with the others' sources.

        Args:
            most: tokens that each model may still run in this step.

        Returns:
            Those that cannot draw yet.
        """
        prompts = [request.prompt for request in requests]
        entered = enter(self.model, _BASE, requests, prompts, most[_BASE], finishes=True)
        most[_BASE] = entered.left
        self.rows += sum(entered.rows)
        self.passes += len(entered.rows)
        for request, adopted in entered.adopted.items():
            request.stats.cached_tokens += adopted
        return entered.waiting

    def draw(self, requests: Sequence[Request], steps: int) -> Drawn:
        """Sample the next ``steps`` tokens of every growing candidate; the host waits for none."""
        begun = [request for request in requests if request.begins]
        new = [request.stats for request in begun]
        old = [request.stats for request in requests if not request.begins]
        layout = DrawLayout(_beams(requests), self.model.pool.manager)
        # The first token of all children of a beam comes from one row of logits, and only then
        # are they forked: what they share is forwarded once.
        with timed("prefill_s", new), timed("decode_s", old):
            draws = self.decoder.begin(layout, steps)
            if draws is None:
                logits = self.first_logits(requests)
        if draws is None:
            with timed("decode_s", new + old):
                draws = self._decode(requests, logits, steps)
        else:
            self.rows += layout.num_sources + layout.rows * (steps - 1)
            self.passes += steps
        return Drawn(list(requests), begun, draws)

    def take(self, drawn: Drawn, memory: Tensor) -> None:
        """Give candidates what was drawn for them, up to where they end.

        A request in which the base produced NaN or infinity gets its ``error``.

        Args:
            memory: of the draws, on the host.
        """
        draws = drawn.draws
        self._taken(
            drawn,
            take_tokens(_beams(drawn.requests), memory.numpy(), draws.rows, draws.logprobs_at),
        )

    def take_selected(
        self,
        drawn: Drawn,
        requests: Sequence[Request],
        selection: Selection,
        words: NDArray[np.int64],
    ) -> None:
        """The same where it stands in a selection.

        Args:
            requests: among whom was selected: all that were drawn for, at least.
            words: what was selected, on the host.
        """
        beams, drawing, steps = _beams(requests), _beams(drawn.requests), len(drawn.draws)
        self._taken(
            drawn,
            take_selected(beams, drawing, selection.cu_tokens, words, *selection.sizes, steps),
        )

    def _taken(self, drawn: Drawn, broken: list[tuple[int, int, int]]) -> None:
        for index, _, position in broken:
            request = drawn.requests[index]
            request.error = request.error or NumericalError.at(self.model.name, position)
        if drawn.begun:
            self._remember([request for request in drawn.begun if request.error is None])
        release_finished(_beams(drawn.requests), self.model.pool.manager, _BASE)

    def first_logits(self, requests: Sequence[Request]) -> Tensor:
        """Append what stands before the first tokens; the logits behind, once for each child."""
        slots, counts, children, tokens, tree = lay_out_sources(
            _beams(requests), self.model.pool.manager
        )
        last = np.cumsum(counts, dtype=np.int64) - 1
        there = to_device(
            {"last": last, "source": np.repeat(np.arange(len(slots)), children)}, self.model.device
        )
        ends = []
        for part, hidden in forward_in_passes(self.model, slots, tokens, counts, RowTree(*tree)):
            begin = part.tokens.start
            own = slice(*np.searchsorted(last, (begin, part.tokens.stop)))
            index = there["last"][own]
            ends.append(hidden.index_select(0, index - begin if begin else index))
            self.rows += len(part.counts)
            self.passes += 1
        logits = self.decoder.logits(torch.cat(ends) if len(ends) > 1 else ends[0])
        return logits.index_select(0, there["source"])

    def _decode(self, requests: Sequence[Request], logits: Tensor, steps: int) -> Draws:
        """Fork the sources, and sample all their children's tokens from ``logits`` on."""
        beams, pool = _beams(requests), self.model.pool
        copies = fork_beams(beams, pool.manager, _BASE)
        slots, columns, tree = lay_out_rows(beams)
        self.rows += len(slots) * (steps - 1)
        self.passes += steps - 1
        return self.decoder.run(
            slots, RowTree(*tree), SamplingColumns(*columns), logits, steps, copies
        )

    def _remember(self, requests: Sequence[Request]) -> None:
        """Let later requests find these prompts; not those that made a model fail."""
        # The first child has its parent's pages.
        slots = [request.beams.slot_of_first(_BASE) for request in requests]
        self.model.pool.remember(slots, [request.prompt for request in requests])

    def keep_only(self, requests: Sequence[Request]) -> None:
        """Give back every slot of the base that none of these requests holds."""
        self.model.pool.release_others(held_slots(_beams(requests), _BASE))


def _beams(requests: Sequence[Request]) -> list[Beams]:
    return [request.beams for request in requests]
