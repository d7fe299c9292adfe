"""The base's side of the search: candidates grow by sampled tokens, in slots of the base."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from w2s_fast._pages import (
    Beams,
    held_slots,
    release_finished,
    take_selected,
    take_tokens,
)
from w2s_fast.decoding import DecodeGraphs, Decoder
from w2s_fast.errors import NumericalError
from w2s_fast.models import PagedModel
from w2s_fast.search.endings import end_texts
from w2s_fast.search.entrance import enter
from w2s_fast.search.expansion import Drawn, Expansion
from w2s_fast.search.request import Request
from w2s_fast.search.selection import Selection

_BASE = 0  # among the models of a request's beams


class BaseSide:
    """Expands candidates in the base."""

    def __init__(
        self, model: PagedModel, vocab_size: int, graphs: DecodeGraphs | None = None
    ) -> None:
        """``vocab_size``: ids from here on are padding. ``graphs``: decoding steps."""
        self.model = model
        self.expansion = Expansion(Decoder([model], vocab_size, graphs))

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
        self.expansion.rows += sum(entered.rows)
        self.expansion.passes += len(entered.rows)
        for request, adopted in entered.adopted.items():
            request.stats.cached_tokens += adopted
        return entered.waiting

    def draw(self, requests: Sequence[Request], steps: int) -> Drawn:
        """Sample the next ``steps`` tokens of every growing candidate; the host waits for none."""
        return self.expansion.draw(requests, steps)

    def first_logits(self, requests: Sequence[Request]) -> Tensor:
        """Append what stands before the next tokens; the logits behind, once for each child."""
        return self.expansion.first_logits(requests)[0]

    def take(self, drawn: Drawn, memory: Tensor) -> None:
        """Give candidates what was drawn for them, up to where they or their chunks end.

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
        end_texts(drawn.requests)
        release_finished(_beams(drawn.requests), self.model.pool.manager, _BASE)

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
