"""One step of the search for many requests at once: expand, score, select, fork.

A round of a request samples up to L tokens for each candidate, scores them, and keeps the best.
Requests need not be at the same point of their rounds: a step samples as many tokens as the
request nearest to its selection still needs, and scores and selects those that got there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from w2s_fast._pages import (
    Beams,
    begin_rounds,
    end_rounds,
    entering,
    keep_all,
    take_scores,
    tokens_left,
)
from w2s_fast.attention import Reading
from w2s_fast.decoding import DecodeGraphs
from w2s_fast.errors import NumericalError
from w2s_fast.models import PagedModel, inference
from w2s_fast.search.base_side import BaseSide, Drawn
from w2s_fast.search.beam_side import BeamSide, Continuations
from w2s_fast.search.guide import PagedGuide
from w2s_fast.search.guide_side import GuideSide
from w2s_fast.search.request import Request
from w2s_fast.search.score_graphs import ScoreGraphs
from w2s_fast.search.selection import Selection
from w2s_fast.stats import timed

# A step samples no more tokens than this before the host looks at them; rows that met EOS are
# carried along until then.
MAX_STEP_TOKENS = 16
# A step samples at least this many tokens, as long as some chunk asks for them: with chunks of many
# lengths the guides would otherwise run after nearly every token. And no more beside a beam search,
# which takes one in a step.
LEAST_STEP_TOKENS = 4


class InFlight(NamedTuple):
    """A step that was launched, and of which the host has not read everything.

    Others may be launched before it is finished. They run behind it on the same stream, from the
    same recordings, and overwrite the same memory: plans, what the steps drew, what was selected.
    So all that is to be read is on its way to the host when they begin, into memory of its own,
    and nobody waits for them.

    Attributes:
        requests: who takes part. complete: those whose round ends with this step, if they stay
            sound. scored: those of them whose candidates the guides have scored.
        drawn: tokens that the host has not read; None: it has all.
        selection: among the candidates of ``scored``; None: there are none.
        reading: of what was drawn, unless all of it stands in the selection, and of the selection;
            None: of nothing.
        continuations: of those that are beam searches; None: there are none.
    """

    requests: Sequence[Request]
    complete: Sequence[Request]
    scored: Sequence[Request]
    drawn: Drawn | None
    selection: Selection | None
    reading: Reading | None
    continuations: Continuations | None


class Search:
    """The search over one base and its guides; requests hold their own state.

    Attributes:
        models: the base and the guides' models, each with its own pages.
    """

    def __init__(
        self,
        base: PagedModel,
        guides: Sequence[PagedGuide],
        vocab_size: int,
        graphs: DecodeGraphs | None = None,
        score_graphs: ScoreGraphs | None = None,
        *,
        ahead: bool = False,
    ) -> None:
        """Over these models.

        Args:
            vocab_size: ids from here on are padding. graphs: decoding steps of the base.
            score_graphs: selections in the guides.
            ahead: launch all of a round before the host reads what was drawn. The guides then run
                tokens behind an EOS, too, which count for nothing; it pays where the host would
                have to wait for a device.
        """
        self.base = BaseSide(base, vocab_size, graphs)
        self.beams = BeamSide(self.base)
        self.guides = GuideSide(guides, score_graphs)
        self._ahead = ahead
        self.models = [base, *(model for guide in guides for model in guide.models)]
        self._managers = [model.pool.manager for model in self.models]

    @property
    def ahead(self) -> bool:
        """Whether a step is launched before the host reads what it draws."""
        return self._ahead

    def step(self, requests: Sequence[Request]) -> None:
        """Bring every request some tokens further; select in those whose round is complete.

        Those whose texts do not all stand take part without drawing: of their texts each model
        runs as many tokens in a step as in a pass, those of the most urgent first.

        A request in which a model produced NaN or infinity gets its ``error`` and gives its
        pages back; the others are not touched by it.
        """
        self.finish(self.launch(requests))

    @inference
    def launch(self, requests: Sequence[Request]) -> InFlight:
        """The part of a step in which the device is given its work; :meth:`finish` is the other.

        Until then nobody else may touch these requests. Ahead, the host waits for nothing here,
        unless chunks end one soon after the other, or texts enter that begin alike.
        """
        # Tokens that each model may still run of texts: nobody waits long for those of others.
        most = [model.max_pass_tokens for model in self.models]
        beams = _beams(requests)
        begin_rounds(beams)
        going_on: Sequence[Request] = requests
        if late := entering(beams, self._managers):
            waiting = self._enter([requests[i] for i in late], most)
            going_on = [request for request in requests if request not in waiting]
            beams = _beams(going_on)
        continuations = None
        if searching := [request for request in going_on if request.is_beam_search]:
            continuations = self.beams.run(searching)
            going_on = [request for request in going_on if not request.is_beam_search]
            beams = _beams(going_on)
        left = tokens_left(beams)
        tokens = min(_step_tokens(left), LEAST_STEP_TOKENS if searching else MAX_STEP_TOKENS)
        drawn = None
        while tokens > 0 and any(left):
            if drawn is not None:
                self._take(drawn)
                left = tokens_left(beams)
                if not any(left):
                    drawn = None
                    break
            count = min(tokens, min(filter(None, left)))
            drawn = self.base.draw([r for r, more in zip(going_on, left) if more], count)
            tokens -= count
            # As far as is known: who ends before that is complete, too.
            left = [more and more - count for more in left]
        if drawn is not None and not self._ahead:
            self._take(drawn)
            drawn, left = None, tokens_left(beams)
        complete = [r for r, more in zip(going_on, left) if r.error is None and not more]
        scored = [request for request in complete if request.uses_guides]
        if new := [request for request in scored if request.beams.round == 1]:
            with timed("prefill_s", [request.stats for request in new]):
                waiting = self.guides.prefill(new, most)
            scored = [request for request in scored if request not in waiting]
        drawing, draws = ([], None) if drawn is None else (drawn.requests, drawn.draws)
        with timed("scoring_s", [request.stats for request in scored]):
            selection = self.guides.score(scored, drawing, draws) if scored else None
        # In a selection stands all that was drawn for whom it selects.
        apart = selection is None or not set(scored).issuperset(drawing)
        tensors = [draws.memory] if apart and draws is not None else []
        tensors += [] if selection is None else [selection.packed]
        reading = Reading(*tensors) if tensors else None
        return InFlight(requests, complete, scored, drawn, selection, reading, continuations)

    @inference
    def finish(self, step: InFlight) -> None:
        """Read what a step found, and close the rounds that end with it."""
        if step.selection is not None and step.reading is not None:
            with timed("scoring_s", [request.stats for request in step.scored]):
                self._score(step, step.selection, step.reading)
        elif step.drawn is not None:
            self._take(step.drawn, step.reading)
        if unscored := [r for r in step.complete if r.error is None and not r.uses_guides]:
            keep_all(_beams(unscored), self._managers)
            _count_rounds(unscored)
        if step.continuations is not None:
            self.beams.keep(step.continuations)
            self._abort_failed(step.continuations.requests)
            _count_rounds([r for r in step.continuations.requests if r.error is None])

    def set_aside(self, request: Request) -> None:
        """Give back all slots of a request between two rounds; its next step recomputes them."""
        request.beams.set_aside(self._managers)

    def start_over(self, request: Request) -> None:
        """Give back all slots of a request, in whatever it is in the middle of.

        The round under way is drawn anew, from the beams that the last one kept.
        """
        request.beams.start_over(self._managers)

    def abort(self, request: Request) -> None:
        """Give back all slots of a request."""
        request.beams.abort(self._managers)

    def keep_only(self, requests: Sequence[Request]) -> None:
        """Give back every slot that none of these requests holds, whoever took it.

        For when something was interrupted: who took slots may not have come to saying so, and who
        gave some back may still name them.
        """
        self.base.keep_only(requests)
        self.guides.keep_only(requests)

    def _take(self, drawn: Drawn, reading: Reading | None = None) -> None:
        """Read what was drawn, and give it to the candidates; ``reading``: it is under way."""
        with timed("decode_s", [request.stats for request in drawn.requests]):
            (memory,) = (reading or Reading(drawn.draws.memory)).wait()
            self.base.take(drawn, memory)
        self._abort_failed(drawn.requests)

    def _score(self, step: InFlight, selection: Selection, reading: Reading) -> None:
        """Take over the scores of the tokens that the round brought, and keep the best candidates.

        The last of these tokens may not have been read yet; nor those of other requests.
        """
        requests, drawn = step.scored, step.drawn
        # The one place where the host waits for the device.
        *memory, packed = reading.wait()
        words = packed.numpy()
        if drawn is not None:
            if memory:
                self.base.take(drawn, *memory)
            else:
                self.base.take_selected(drawn, requests, selection, words)
        if selection.to_be_repeated(words):
            if drawn is not None:
                self._abort_failed(drawn.requests)
                requests = [request for request in requests if request.error is None]
            if not requests:
                return
            selection = self.guides.score(requests, [], None, again=True)
            (packed,) = Reading(selection.packed).wait()
            words = packed.numpy()
        self._close(requests, selection, words)
        self._abort_failed(requests if drawn is None else [*requests, *drawn.requests])

    def _close(
        self, requests: Sequence[Request], selection: Selection, words: NDArray[np.int64]
    ) -> None:
        """Keep the candidates that were chosen, of those requests that did not fail.

        ``words``: what was selected, on the host.
        """
        for index, token, position in take_scores(
            _beams(requests), selection.cu_tokens, words, *selection.sizes
        ):
            if requests[index].error is None:
                model = self.guides.first_broken(selection, token)
                requests[index].error = NumericalError.at(model.name, position)
        kept, closed = selection.kept(words)[: len(requests)], requests
        if any(request.error is not None for request in requests):
            sound = [i for i, request in enumerate(requests) if request.error is None]
            kept, closed = kept[sound], [requests[i] for i in sound]
        self.guides.remember([request for request in closed if request.beams.round == 1])
        end_rounds(_beams(closed), kept, self._managers)
        _count_rounds(closed)

    def _enter(self, late: Sequence[Request], most: list[int]) -> set[Request]:
        """Run texts that requests go on from, as far as may be; those that have to wait still."""
        back = [r for r in late if r.uses_guides and r.beams.round > 1]
        with timed("prefill_s", [request.stats for request in late]):
            return {*self.base.enter(late, most), *self.guides.prefill(back, most)}

    def _abort_failed(self, requests: Iterable[Request]) -> None:
        for request in requests:
            if request.error is not None:
                self.abort(request)


def _beams(requests: Sequence[Request]) -> list[Beams]:
    return [request.beams for request in requests]


def _count_rounds(requests: Sequence[Request]) -> None:
    for request in requests:
        request.stats.rounds += 1


def _step_tokens(left: Sequence[int]) -> int:
    """How many tokens a step samples, given how many the rounds of its requests still need.

    Up to the end of the last chunk that ends soon after the first one: their guides then run
    together, and the candidates that are done wait for the others.
    """
    nearest = min((tokens for tokens in left if tokens > 0), default=0)
    soon = max(nearest + nearest // 2, LEAST_STEP_TOKENS)
    return min(max((tokens for tokens in left if tokens <= soon), default=nearest), MAX_STEP_TOKENS)
