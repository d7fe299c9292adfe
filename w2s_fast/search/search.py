"""One step of the search for many requests at once: expand, score, select, fork.

A round of a request samples up to L tokens for each candidate, scores them, and keeps the best.
Requests need not be at the same point of their rounds: a step samples as many tokens as the
request nearest to its selection still needs, and scores and selects those that got there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from w2s_fast.decoding import DecodeGraphs
from w2s_fast.errors import NumericalError
from w2s_fast.models import PagedModel
from w2s_fast.search.base_side import BaseSide
from w2s_fast.search.beam import Beam, forget_slots
from w2s_fast.search.guide import PagedGuide
from w2s_fast.search.guide_side import GuideSide
from w2s_fast.search.request import Request
from w2s_fast.search.selection import choose, new_tokens
from w2s_fast.stats import timed

# A step samples no more tokens than this before the host looks at them; rows that met EOS are
# carried along until then.
MAX_STEP_TOKENS = 16
# A step samples at least this many tokens, as long as some chunk asks for them: with chunks of many
# lengths the guides would otherwise run after nearly every token.
LEAST_STEP_TOKENS = 4


class Search:
    """The search over one base and its guides; requests hold their own state."""

    def __init__(
        self,
        base: PagedModel,
        guides: Sequence[PagedGuide],
        vocab_size: int,
        eos_ids: Collection[int],
        graphs: DecodeGraphs | None = None,
    ) -> None:
        """``vocab_size``: ids from here on are padding. ``graphs``: decoding steps of the base."""
        self.base = BaseSide(base, vocab_size, eos_ids, graphs)
        self.guides = GuideSide(guides)

    @property
    def models(self) -> list[PagedModel]:
        """The base and the guides' models, each with its own pages."""
        guides = self.guides.guides
        return [self.base.model, *(model for guide in guides for model in guide.models)]

    def step(self, requests: Sequence[Request]) -> None:
        """Bring every request some tokens further; select in those whose round is complete.

        A request in which a model produced NaN or infinity gets its ``error`` and gives its
        pages back; the others are not touched by it.
        """
        self._restore([request for request in requests if request.aside])
        for request in requests:
            if not request.families:
                request.open_round()
        tokens = _step_tokens([request.tokens_left_in_round() for request in requests])
        while growing := [r for r in requests if r.tokens_left_in_round() > 0]:
            if tokens == 0:
                break
            count = min(tokens, *(request.tokens_left_in_round() for request in growing))
            self.base.expand(growing, count)
            self._abort_failed(growing)
            tokens -= count
        complete = [r for r in requests if r.error is None and r.tokens_left_in_round() == 0]
        scored = [r for r in complete if r.params.uses_guides]
        new = [r for r in scored if r.round_number == 1]
        with timed("prefill_s", [r.stats for r in new]):
            self.guides.prefill(new)
        with timed("scoring_s", [r.stats for r in scored]):
            self._score(scored)
        for request in complete:
            if not request.params.uses_guides:
                self._close_round(request, range(len(request.candidates)))

    def set_aside(self, request: Request) -> None:
        """Give back all slots of a request between two rounds; its next step recomputes them."""
        request.aside = True  # first: from here on it holds nothing, see keep_only
        self._release(request.beams)

    def start_over(self, request: Request) -> None:
        """Give back all slots of a request, in whatever it is in the middle of.

        The round under way is drawn anew, from the beams that the last one kept.
        """
        held, begun = request.holders, bool(request.families)
        # In one statement, and first: from here on it holds nothing, see keep_only.
        request.families, request.round_number, request.aside = (
            [],
            request.round_number - begun,
            bool(request.beams),
        )
        self._release(held)

    def abort(self, request: Request) -> None:
        """Give back all slots of a request."""
        self._release(request.holders)
        request.families = []
        request.aside = False

    def keep_only(self, requests: Sequence[Request]) -> None:
        """Give back every slot that none of these requests holds, whoever took it.

        For when something was interrupted: who took slots may not have come to saying so, and who
        gave some back may still name them.
        """
        for request in requests:
            if request.aside:
                forget_slots(request.beams)
        beams = [beam for request in requests for beam in request.holders]
        self.base.keep_only(beams)
        self.guides.keep_only(beams)

    def _score(self, requests: Sequence[Request]) -> None:
        """Score the tokens that the round brought, and keep the best candidates."""
        if not requests:
            return
        owned = [
            (request, family)
            for request in requests
            for family in request.families
            if not family.parent.finished
        ]
        self.guides.fork([family for _, family in owned])
        tuned, untuned = self.guides.logprobs(
            [(request, beam) for request, family in owned for beam in family.children]
        )
        beams = [beam for request in requests for beam in request.candidates]
        chunks = [new_tokens(beam) for beam in beams]
        choice = choose(requests, chunks, tuned, untuned, self.guides.weights)
        owners = [request for request in requests for _ in request.candidates]
        for request, beam, broken in zip(owners, beams, choice.broken):
            if broken is not None and request.error is None:
                model = self.guides.first_broken(tuned[:, broken.token], untuned[:, broken.token])
                position = len(beam.token_scores) + broken.offset
                request.error = NumericalError.at(model.name, position)
        for request, beam, new, score in zip(owners, beams, choice.token_scores, choice.scores):
            beam.token_scores.extend(new)
            beam.total = score
            request.scored_tokens += len(new)
        for request, kept in zip(requests, choice.kept):
            if request.error is None:
                if request.round_number == 1:
                    self.guides.remember(request)
                self._close_round(request, kept)
        self._abort_failed(requests)

    # Select

    def _close_round(self, request: Request, kept: Sequence[int]) -> None:
        """Keep candidates by their indices; give back what only losers and finished ones used."""
        candidates = request.candidates
        request.close_round(kept)
        winners = {id(beam) for beam in request.beams if not beam.finished}
        self._release([beam for beam in candidates if id(beam) not in winners])

    # Slots

    def _restore(self, requests: Sequence[Request]) -> None:
        """Recompute what requests that were set aside held."""
        if not requests:
            return
        with timed("prefill_s", [request.stats for request in requests]):
            alive = [[beam for beam in r.beams if not beam.finished] for r in requests]
            self.base.recompute(requests, alive)
            self.guides.recompute(requests, alive)
        for request in requests:
            request.aside = False

    def _abort_failed(self, requests: Iterable[Request]) -> None:
        for request in requests:
            if request.error is not None:
                self.abort(request)

    def _release(self, beams: Sequence[Beam]) -> None:
        self.base.release(beams)
        self.guides.release(beams)


def _step_tokens(left: Sequence[int]) -> int:
    """How many tokens a step samples, given how many the rounds of its requests still need.

    Up to the end of the last chunk that ends soon after the first one: their guides then run
    together, and the candidates that are done wait for the others.
    """
    nearest = min((tokens for tokens in left if tokens > 0), default=0)
    soon = max(nearest + nearest // 2, LEAST_STEP_TOKENS)
    return min(max((tokens for tokens in left if tokens <= soon), default=nearest), MAX_STEP_TOKENS)
