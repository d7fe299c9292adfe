"""One step of the search for many requests at once: expand, score, select, fork.

A round of a request samples up to L tokens for each candidate, scores them, and keeps the best.
Requests need not be at the same point of their rounds: a step samples as many tokens as the
request nearest to its selection still needs, and scores and selects those that got there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
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
from w2s_fast.decoding import RecordedSteps
from w2s_fast.errors import NumericalError
from w2s_fast.models import PagedModel, inference
from w2s_fast.search.base_side import BaseSide
from w2s_fast.search.beam_side import BeamSide, Continuations
from w2s_fast.search.choices import Choices, count_rounds
from w2s_fast.search.expansion import Decoded, Drawn
from w2s_fast.search.foreign_guide import ForeignGuides
from w2s_fast.search.foreign_side import ForeignSide
from w2s_fast.search.fused_side import FusedSide
from w2s_fast.search.guide import PagedGuide, distinct_models
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
        fused: tokens that the host has not read, of all models together; None: it has all.
        drawn: the same, of the base alone. apart: whether they are not all in the selection.
        selection: among the candidates of ``scored``; None: there are none.
        reading: of these three, in this order; None: of nothing.
        continuations: of those that are beam searches; None: there are none.
    """

    requests: Sequence[Request]
    complete: Sequence[Request]
    scored: Sequence[Request]
    fused: Drawn | None
    drawn: Drawn | None
    apart: bool
    selection: Selection | None
    reading: Reading | None
    continuations: Continuations | None


class Search:
    """The search over one base and its guides; requests hold their own state.

    Attributes:
        models: the base, and the guides' other models, each with its own pages.
        foreign: guides of other vocabularies, over theirs.
        records: whether passes are recorded.
    """

    def __init__(
        self,
        base: PagedModel,
        guides: Sequence[PagedGuide],
        vocab_size: int,
        graphs: RecordedSteps | None = None,
        score_graphs: ScoreGraphs | None = None,
        *,
        ahead: bool = False,
        foreign: ForeignGuides | None = None,
    ) -> None:
        """Over these models.

        Args:
            vocab_size: ids from here on are padding. graphs: recorded steps of decoding.
            score_graphs: selections in the guides.
            ahead: launch all of a round before the host reads what was drawn. The guides then run
                tokens behind an EOS, too, which count for nothing; it pays where the host would
                have to wait for a device.
            foreign: guides of other vocabularies.
        """
        self.models = distinct_models(base, guides)
        alone, together = graphs or (None, None)
        self.base = BaseSide(base, vocab_size, alone)
        self.beams = BeamSide(self.base)
        self.guides = GuideSide(guides, self.models, vocab_size, score_graphs)
        self.fused = FusedSide(
            self.models, self.guides.roles, self.guides.weights, vocab_size, together
        )
        self.foreign = ForeignSide(foreign, base.agree)
        self._ahead = ahead
        self.records = graphs is not None
        self._managers = [model.pool.manager for model in self.models]
        self._choices = Choices(self.models, self.foreign, [self.foreign])

    @property
    def devices(self) -> list[torch.device]:
        """Of all models; the base's is the first."""
        return list(dict.fromkeys(model.device for model in self.all_models))

    @property
    def decoded(self) -> Decoded:
        """All that decoding passes of the base have run so far."""
        alone, together = self.base.expansion, self.fused.expansion
        return Decoded(alone.rows + together.rows, alone.passes + together.passes)

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """For ``with``: what is decoded within does not count."""
        sides = self.base.expansion, self.fused.expansion
        before = [(side.rows, side.passes) for side in sides]
        yield
        for side, counts in zip(sides, before):
            side.rows, side.passes = counts

    @property
    def all_models(self) -> list[PagedModel]:
        """Those of foreign guides included."""
        return [*self.models, *self.foreign.models]

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
        # On a CPU 16 tokens of a stream take a while, and looking at them costs next to nothing.
        if not self._ahead and any(r.streams for r in requests) and tokens > 2 * LEAST_STEP_TOKENS:
            tokens = LEAST_STEP_TOKENS
        fused = drawn = None
        while tokens > 0 and any(left):
            if fused is not None or drawn is not None:
                self._take(fused, drawn)
                fused = drawn = None
                left = tokens_left(beams)
                if not any(left):
                    break
            count = min(tokens, min(filter(None, left)))
            drawing = [request for request, more in zip(going_on, left) if more]
            if together := [request for request in drawing if request.fuses]:
                fused = self.fused.draw(together, count)
            if alone := [request for request in drawing if not request.fuses]:
                drawn = self.base.draw(alone, count)
            tokens -= count
            # As far as is known: who ends before that is complete, too.
            left = [more and more - count for more in left]
        if not self._ahead or any(request.is_read for request in going_on):
            self._take(fused, drawn)
            fused, drawn, left = None, None, tokens_left(beams)
        complete = [r for r, more in zip(going_on, left) if r.error is None and not more]
        if foreign := [request for request in complete if request.foreign is not None]:
            with timed("prefill_s", [request.stats for request in foreign]):
                waiting = self.foreign.enter(foreign)
            complete = [request for request in complete if request not in waiting]
        scored = [r for r in complete if r.uses_guides and not r.fuses]
        if new := [request for request in scored if request.beams.round == 1]:
            with timed("prefill_s", [request.stats for request in new]):
                waiting = self.guides.prefill(new, most)
            scored = [request for request in scored if request not in waiting]
        drawing, draws = ([], None) if drawn is None else (drawn.requests, drawn.draws)
        with timed("scoring_s", [request.stats for request in scored]):
            selection = self.guides.score(scored, drawing, draws) if scored else None
        # In a selection stands all that was drawn for whom it selects.
        apart = drawn is not None and not set(scored).issuperset(drawing)
        tensors = [] if fused is None else [fused.draws.memory]
        tensors += [] if draws is None or not apart else [draws.memory]
        tensors += [] if selection is None else [selection.packed]
        reading = Reading(*tensors) if tensors else None
        return InFlight(
            requests,
            complete,
            scored,
            fused,
            drawn,
            apart,
            selection,
            reading,
            continuations,
        )

    @inference
    def finish(self, step: InFlight) -> None:
        """Read what a step found, and close the rounds that end with it."""
        if step.reading is not None:
            self._read(step, step.reading)
        if step.continuations is not None:
            searching = step.continuations.requests
            self.beams.keep(step.continuations)
            count_rounds([request for request in searching if request.error is None])
            self._abort_failed(searching)
        # Whose scores are known, or who has none.
        known = (request for request in step.complete if request.fuses or not request.uses_guides)
        if done := [request for request in known if request.error is None]:
            plain = [request for request in done if not request.host_chooses]
            keep_all(_beams(plain), self._managers)
            count_rounds(plain)
            self._open_choices([request for request in done if request.host_chooses])

    @inference
    def close(self, requests: Sequence[Request]) -> None:
        """Close rounds of which it was decided who is kept; others may have stepped meanwhile."""
        self._choices.close(requests)
        self._abort_failed(requests)

    def set_aside(self, request: Request) -> None:
        """Give back all slots of a request between two rounds; its next step recomputes them."""
        request.beams.set_aside(self._managers)
        self.foreign.give_up(request)

    def start_over(self, request: Request) -> None:
        """Give back all slots of a request, in whatever it is in the middle of.

        The round under way is drawn anew, from the beams that the last one kept.
        """
        request.choice = None
        request.beams.start_over(self._managers)
        self.foreign.give_up(request)

    def abort(self, request: Request) -> None:
        """Give back all slots of a request."""
        request.choice = None
        request.beams.abort(self._managers)
        self.foreign.forget(request)

    def keep_only(self, requests: Sequence[Request]) -> None:
        """Give back every slot that none of these requests holds, whoever took it.

        For when something was interrupted: who took slots may not have come to saying so, and who
        gave some back may still name them.
        """
        self.base.keep_only(requests)
        self.guides.keep_only(requests)
        self.foreign.keep_only(requests)

    def _take(self, fused: Drawn | None, drawn: Drawn | None) -> None:
        """Read what was drawn, and give it to the candidates."""
        for side, own in ((self.fused, fused), (self.base, drawn)):
            if own is None:
                continue
            with timed("decode_s", [request.stats for request in own.requests]):
                (memory,) = Reading(own.draws.memory).wait()
                side.take(own, memory)
            self._abort_failed(own.requests)

    def _read(self, step: InFlight, reading: Reading) -> None:
        """Take over what a step has found."""
        drawing = [own for own in (step.fused, step.drawn) if own is not None]
        who = step.scored or [request for own in drawing for request in own.requests]
        with timed("scoring_s" if step.scored else "decode_s", [request.stats for request in who]):
            # The one place where the host waits for the device.
            read = iter(reading.wait())
            if step.fused is not None:
                self.fused.take(step.fused, next(read))
            if step.drawn is not None and step.apart:
                self.base.take(step.drawn, next(read))
            if step.selection is not None:
                self._score(step, step.selection, next(read).numpy())
        self._abort_failed(step.requests)

    def _score(self, step: InFlight, selection: Selection, words: NDArray[np.int64]) -> None:
        """Take over the scores of the tokens that the round brought, and keep the best candidates.

        The last of these tokens may stand in the selection alone. ``words``: it, on the host.
        """
        requests = step.scored
        if step.drawn is not None and not step.apart:
            self.base.take_selected(step.drawn, requests, selection, words)
        if selection.to_be_repeated(words):
            self._abort_failed(step.requests)
            requests = [request for request in requests if request.error is None]
            if not requests:
                return
            selection = self.guides.score(requests, [], None, again=True)
            (packed,) = Reading(selection.packed).wait()
            words = packed.numpy()
        self._close(requests, selection, words)

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
        if any(request.host_chooses for request in closed):
            self._open_choices([request for request in closed if request.host_chooses])
            others = [i for i, request in enumerate(closed) if not request.host_chooses]
            kept, closed = kept[others], [closed[i] for i in others]
        end_rounds(_beams(closed), kept, self._managers)
        count_rounds(closed)

    def _open_choices(self, requests: Sequence[Request]) -> None:
        self._choices.open(requests)
        self._abort_failed(requests)

    def _enter(self, late: Sequence[Request], most: list[int]) -> set[Request]:
        """Run texts that requests go on from, as far as may be; those that have to wait still."""
        back = [r for r in late if r.uses_guides and (r.beams.round > 1 or r.fuses)]
        with timed("prefill_s", [request.stats for request in late]):
            return {*self.base.enter(late, most), *self.guides.prefill(back, most)}

    def _abort_failed(self, requests: Iterable[Request]) -> None:
        for request in requests:
            if request.error is not None:
                self.abort(request)


def _beams(requests: Sequence[Request]) -> list[Beams]:
    return [request.beams for request in requests]


def _step_tokens(left: Sequence[int]) -> int:
    """How many tokens a step samples, given how many the rounds of its requests still need.

    Up to the end of the last chunk that ends soon after the first one: their guides then run
    together, and the candidates that are done wait for the others.
    """
    if left and left.count(left[0]) == len(left):  # as where all are in step
        return min(left[0], MAX_STEP_TOKENS)
    nearest = min((tokens for tokens in left if tokens > 0), default=0)
    soon = max(nearest + nearest // 2, LEAST_STEP_TOKENS)
    return min(max((tokens for tokens in left if tokens <= soon), default=nearest), MAX_STEP_TOKENS)
