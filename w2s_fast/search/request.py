"""One request under way: its prompt, its parameters, and the beams of its search."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from w2s_fast._pages import Beam, Beams
from w2s_fast.errors import W2SFastError
from w2s_fast.kernels.noise import seed_bits
from w2s_fast.params import SearchParams
from w2s_fast.remote import Drawing, RemotePrompt, to_text
from w2s_fast.result import Candidate, Draw, Round
from w2s_fast.search.choice import OpenChoice
from w2s_fast.search.foreign_guide import ForeignPrompt
from w2s_fast.stats import RequestStats

_INT32_MAX = 2**31 - 1
# Continuations of a beam beyond those that are enough where no text ends by what it says.
_MOST_ENDED = 64


def _log(share: float) -> float:
    return math.log(share) if share > 0 else -math.inf


class End(Protocol):
    """Where a text ends: ``tokens`` are kept."""

    @property
    def tokens(self) -> int: ...


class Ends(Protocol):
    """What says where the text of a response ends."""

    def find(self, tokens: Sequence[int], known: int) -> End | None:
        """``tokens``: of the response so far, of which ``known`` were looked at before."""
        ...

    def settled(self, tokens: Sequence[int], known: int) -> int:
        """How many of the tokens are kept whatever comes, where no text has ended yet."""
        ...


class Breaks(Protocol):
    """What says where the chunk of a candidate ends before its full length."""

    def find(self, tokens: Sequence[int], known: int) -> int | None:
        """How many of the tokens there are up to the chunk's end, if it is there.

        ``tokens``: of the response so far, of which ``known`` stood before this round.
        """
        ...


class Request:
    """A prompt, its parameters, and the state of its search.

    Attributes:
        beams: its hypotheses and candidates, with their tokens, scores and slots (csrc/beams.h).
    """

    def __init__(
        self,
        prompt: Sequence[int],
        guide_prompts: Sequence[Sequence[int]],
        params: SearchParams,
        priority: int = 0,
        eos_ids: Collection[int] = (),
        betas: Sequence[float] = (),
        *,
        given: Any = None,
        has_scorers: bool = False,
        ends: Ends | None = None,
        breaks: Breaks | None = None,
        foreign: ForeignPrompt | None = None,
        has_guides: bool | None = None,
        remote: RemotePrompt | None = None,
    ) -> None:
        """``prompt``: the base's tokens, at least one; ``guide_prompts``: those of each other model
        of the search, in their order; none if no guide runs.

        ``priority``: the lower, the sooner. ``eos_ids``: what ends a response, unless it is to be
        ignored. ``betas``: the factor of each guide, where logits are fused. ``given``: the prompt
        as its caller gave it. ``has_scorers``: others than the guides have a say in which
        candidates are kept; then there need be no guides. ``ends``: of texts; None: none does.
        ``breaks``: ends of chunks; None: they have their full length. ``foreign``: the prompt as
        guides of other vocabularies have it; None: there are none. ``has_guides``: whether there
        are others; None: where nobody else has a say, or they have prompts.
        """
        self.prompts = [list(prompt), *map(list, guide_prompts)]  # of each model that runs
        self.params = params
        self.priority = priority
        self.given = given
        self.foreign = foreign
        self.foreign_tokens = 0  # of its responses, that such guides have scored
        # Asked for in every step: of the parameters.
        others = has_scorers or foreign is not None
        if has_guides is None:
            has_guides = not others or bool(guide_prompts)
        self.uses_guides = params.uses_guides and has_guides
        self.has_scorers = has_scorers and params.uses_guides and params.method in ("cbs", "bon")
        self.beams = Beams(
            self.prompt,
            [(len(own), own[-1]) for own in self.prompts[1:]],
            # More would not fit anywhere: the scheduler refuses it.
            first_candidates=min(params.first_candidates, _INT32_MAX),
            widths=_as_int32(params.widths.kept),
            successors=_as_int32(params.widths.successors),
            chunks=_as_int32(params.widths.chunks),
            max_new_tokens=_INT32_MAX if remote else min(params.max_new_tokens, _INT32_MAX),
            hold=params.finished == "hold",
            mean=params.score == "mean",
            dedup=params.dedup,
            uses_guides=self.uses_guides,
            trace=params.trace,
            copies=params.keeps_copies,
            eos_ids=[] if params.ignore_eos else sorted(eos_ids),
            stop_ids=list(params.stop_token_ids),
            min_new_tokens=min(params.min_new_tokens, _INT32_MAX),
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            seed=seed_bits(params.seed),
            betas=list(betas),
            plausibility=_log(params.plausibility),
            dynamic=params.fuses == "dynamic_fusion",
            length_penalty=params.length_penalty if params.method == "beam" else None,
            early_stopping=None if params.early_stopping == "never" else params.early_stopping,
        )
        self.urgency = (0, 0)  # the scheduler's: smaller numbers run first
        # Pages of the round under way in every model, and its rows, as the scheduler counts them;
        # before the first, rows of any.
        self.promised: Sequence[int] = ()
        self.rows = params.rows
        self.fuses = params.fuses is not None
        ranked = params.method in ("cbs", "bon") and self.uses_guides
        # Whether the host chooses who is kept, and whether code of the caller's has a say in it.
        # Of fused candidates all scores are known when they are drawn: no pass ranks them.
        self.host_chooses = (
            self.has_scorers
            or foreign is not None
            or (ranked and (params.selection != "top" or self.fuses))
        )
        self.asks_the_caller = self.has_scorers or callable(params.selection)
        # Of a round whose candidates are complete, until it is closed: nobody draws for it then.
        self.choice: OpenChoice | None = None
        self.remote = remote
        self.drawing: Drawing | None = None  # of a round in a remote base, until it is closed
        self.draws: list[list[Draw]] = []  # of those that were, with a trace
        self.token_counts: list[int] = []  # of its hypotheses there
        self.ended_early: str | None = None  # why
        self.is_beam_search = params.method == "beam"
        # Of a beam search, the continuations of a beam that are enough to choose from: as many may
        # end as there are ids that end a response.
        ended_by = {*params.stop_token_ids, *([] if params.ignore_eos else eos_ids)}
        self.ended_by = sorted(ended_by)
        self.ends_late = params.min_new_tokens > 0
        self.continuations = params.kept + len(ended_by)
        if ends is not None:  # and so may any number, by what they say: so many at least
            self.continuations += 3 * params.kept + _MOST_ENDED
        self.ends = ends
        self.breaks = breaks
        # Whether the host reads what was drawn before anything comes of it.
        self.is_read = ends is not None or breaks is not None
        self.ended_texts: list[Any] = []  # what was found; beams have their numbers
        self.stats = RequestStats()
        self.streams = False  # whether somebody wants to know what its hypotheses agree on
        self.agreed: list[int] = []  # that, after the last step it took part in
        # Called between two steps, after each it took part in and when it has ended; by the thread
        # that took the step, so it must not wait for anything.
        self.listener: Callable[[], None] | None = None
        self.error: W2SFastError | None = None
        self.ended = False  # its pages are free, and its result can be read

    @property
    def prompt(self) -> list[int]:
        """The base's."""
        return self.prompts[0]

    @property
    def done(self) -> bool:
        """Whether its search has ended: by its hypotheses, or by an error."""
        return self.error is not None or self.beams.done

    @property
    def rests(self) -> bool:
        """Whether it waits for somebody else: who chooses for it, or draws."""
        drawn = self.drawing is None or self.drawing.complete
        return self.choice is not None or not drawn

    @property
    def in_round(self) -> bool:
        """Whether it is in the middle of a round."""
        return self.beams.open

    @property
    def begins(self) -> bool:
        """Whether its prompt is still to be run."""
        return self.beams.round == 1 and not self.beams.forked

    def agreed_tokens(self) -> list[int]:
        """The longest common prefix of all hypotheses that may be the best one in the end.

        No EOS is among it as long as one goes on. As before where all have ended in the middle of a
        round: what ended them is no text.
        """
        if self.in_round and not self.beams.tokens_left:
            return self.agreed
        return self.beams.agreed()

    def rounds(self, first: int = 0) -> list[Round]:
        """The rounds that have ended, from that one on, if they were to be traced."""
        return [
            Round([self._told(candidate) for candidate in one.candidates], one.kept)
            for one in self.beams.trace(first)
        ]

    def _told(self, beam: Beam) -> Candidate:
        score, reason = self.score_of(beam), beam.finish_reason
        if self.remote is None:
            return Candidate(beam.parent, beam.tokens, score, reason)
        return Candidate(beam.parent, [], score, reason, to_text(beam.tokens))

    def score_of(self, beam: Beam) -> float | None:
        """The beam's score as this request defines it; None where nobody scores."""
        if self.is_beam_search:
            return beam.total
        if not (self.uses_guides or self.has_scorers or self.foreign is not None):
            return None
        return self._guides_score_of(beam) + beam.extra

    def open_choice(
        self, candidates: Sequence[Beam], foreign: NDArray[np.float64] | None = None
    ) -> None:
        """Its round is complete, and the guides have scored it: the host chooses who is kept.

        ``candidates``: of the round. ``foreign``: what guides of other vocabularies say of each.
        """
        scores = [self._guides_score_of(beam) for beam in candidates]
        drawing = self.drawing
        dropped = set() if drawing is None else drawing.dropped
        choice = OpenChoice(self.params, self.beams.round, candidates, scores, dropped)
        if foreign is not None:
            lengths = [len(beam.tokens) for beam in candidates]
            lengths = [max(1, n) for n in (lengths if drawing is None else drawing.tokens)]
            choice.extras += foreign / lengths if self.params.score == "mean" else foreign
        self.choice = choice

    def _guides_score_of(self, beam: Beam) -> float:
        """0 where there are none."""
        # A text may end in its first token, of which nothing is kept.
        return beam.total / max(1, len(beam.tokens)) if self.params.score == "mean" else beam.total


def _as_int32(values: Sequence[int]) -> list[int]:
    return [min(value, _INT32_MAX) for value in values]
