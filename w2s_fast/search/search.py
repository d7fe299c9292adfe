"""One step of the search for many requests at once: expand, score, select, fork.

A round of a request samples up to L tokens for each candidate, scores them, and keeps the best.
Requests need not be at the same point of their rounds: a step samples as many tokens as the
request nearest to its selection still needs, and scores and selects those that got there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from w2s_fast._pages import (
    Beams,
    begin_rounds,
    end_rounds,
    keep_all,
    take_scores,
    tokens_left,
)
from w2s_fast.decoding import DecodeGraphs
from w2s_fast.errors import NumericalError
from w2s_fast.models import PagedModel
from w2s_fast.search.base_side import BaseSide
from w2s_fast.search.guide import PagedGuide
from w2s_fast.search.guide_side import GuideSide
from w2s_fast.search.request import Request
from w2s_fast.search.selection import choose
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
        graphs: DecodeGraphs | None = None,
    ) -> None:
        """``vocab_size``: ids from here on are padding. ``graphs``: decoding steps of the base."""
        self.base = BaseSide(base, vocab_size, graphs)
        self.guides = GuideSide(guides)
        self._managers = [model.pool.manager for model in self.models]

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
        self._restore([request for request in requests if request.beams.aside])
        begin_rounds(_beams(requests))
        left = tokens_left(_beams(requests))
        tokens = _step_tokens(left.tolist())
        while tokens > 0 and (left > 0).any():
            count = min(tokens, int(left[left > 0].min()))
            growing = [request for request, more in zip(requests, left > 0) if more]
            self.base.expand(growing, count)
            self._abort_failed(growing)
            tokens -= count
            left = tokens_left(_beams(requests))
        complete = [r for r, more in zip(requests, left > 0) if r.error is None and not more]
        scored = [request for request in complete if request.params.uses_guides]
        new = [request for request in scored if request.beams.round == 1]
        with timed("prefill_s", [request.stats for request in new]):
            self.guides.prefill(new)
        with timed("scoring_s", [request.stats for request in scored]):
            self._score(scored)
        unscored = [request for request in complete if not request.params.uses_guides]
        keep_all(_beams(unscored), self._managers)
        _count_rounds(unscored)

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

    def _score(self, requests: Sequence[Request]) -> None:
        """Score the tokens that the round brought, and keep the best candidates."""
        if not requests:
            return
        beams = _beams(requests)
        tokens, tuned, untuned = self.guides.logprobs(requests)
        choice = choose(beams, tokens, tuned, untuned, self.guides.weights)
        for index, token, position in take_scores(
            beams, choice.token_scores, choice.scores, choice.broken
        ):
            model = self.guides.first_broken(tuned[:, token], untuned[:, token])
            requests[index].error = NumericalError.at(model.name, position)
        sound = [i for i, request in enumerate(requests) if request.error is None]
        closed = [requests[i] for i in sound]
        self.guides.remember([request for request in closed if request.beams.round == 1])
        end_rounds(_beams(closed), choice.kept[sound], self._managers)
        _count_rounds(closed)
        self._abort_failed(requests)

    def _restore(self, requests: Sequence[Request]) -> None:
        """Recompute what requests that were set aside held."""
        if not requests:
            return
        with timed("prefill_s", [request.stats for request in requests]):
            self.base.recompute(requests)
            self.guides.recompute(requests)
        for request in requests:
            request.beams.resume()

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
