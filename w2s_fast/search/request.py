"""One request under way: its prompt, its parameters, and the beams of its search."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from w2s_fast._pages import Beam, Beams
from w2s_fast.errors import W2SFastError
from w2s_fast.kernels.noise import seed_bits
from w2s_fast.params import SearchParams
from w2s_fast.result import Candidate, Round
from w2s_fast.stats import RequestStats

_INT32_MAX = 2**31 - 1


class Request:
    """A prompt, its parameters, and the state of its search.

    Attributes:
        beams: its hypotheses and candidates, with their tokens, scores and slots (csrc/beams.h).
    """

    def __init__(
        self,
        prompt: Sequence[int],
        guide_prompts: Sequence[tuple[Sequence[int], Sequence[int]]],
        params: SearchParams,
        priority: int = 0,
        eos_ids: Collection[int] = (),
    ) -> None:
        """``prompt``: the base's tokens, at least one; ``guide_prompts``: for each guide those of
        its tuned model and those of its untuned one.

        ``priority``: the lower, the sooner. ``eos_ids``: what ends a response, unless it is to be
        ignored.
        """
        self.prompt = list(prompt)
        self.guide_prompts = [(list(tuned), list(untuned)) for tuned, untuned in guide_prompts]
        self.params = params
        self.priority = priority
        self.beams = Beams(
            self.prompt,
            [(len(own), own[-1]) for guide in self.guide_prompts for own in guide],
            # More would not fit anywhere: the scheduler refuses it.
            first_candidates=min(params.first_candidates, _INT32_MAX),
            width=min(params.kept, _INT32_MAX),
            successors=min(params.successors, _INT32_MAX),
            chunk=min(params.tokens_per_round, _INT32_MAX),
            max_new_tokens=min(params.max_new_tokens, _INT32_MAX),
            hold=params.finished == "hold",
            mean=params.score == "mean",
            dedup=params.dedup,
            uses_guides=params.uses_guides,
            trace=params.trace,
            eos_ids=[] if params.ignore_eos else sorted(eos_ids),
            stop_ids=list(params.stop_token_ids),
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            seed=seed_bits(params.seed),
            length_penalty=params.length_penalty if params.method == "beam" else None,
            early_stopping=None if params.early_stopping == "never" else params.early_stopping,
        )
        self.urgency = (0, 0)  # the scheduler's: smaller numbers run first
        # Pages of the round under way in every model, as the scheduler counts them.
        self.promised: Sequence[int] = ()
        # Asked for in every step: of the parameters.
        self.rows = params.rows
        self.uses_guides = params.uses_guides
        self.is_beam_search = params.method == "beam"
        # Of a beam search, the continuations of a beam that are enough to choose from: as many may
        # end as there are ids that end a response.
        ends = {*params.stop_token_ids, *([] if params.ignore_eos else eos_ids)}
        self.continuations = params.beam_width + len(ends)
        self.stats = RequestStats()
        self.streams = False  # whether somebody wants to know what its hypotheses agree on
        self.agreed: list[int] = []  # that, after the last step it took part in
        # Called between two steps, after each it took part in and when it has ended; by the thread
        # that took the step, so it must not wait for anything.
        self.listener: Callable[[], None] | None = None
        self.error: W2SFastError | None = None
        self.ended = False  # its pages are free, and its result can be read

    @property
    def done(self) -> bool:
        """Whether its search has ended: by its hypotheses, or by an error."""
        return self.error is not None or self.beams.done

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

    def rounds(self) -> list[Round]:
        """All rounds that have ended, if they were to be traced."""
        return [
            Round(
                [
                    Candidate(c.parent, c.tokens, self.score_of(c), c.finish_reason)
                    for c in one.candidates
                ],
                one.kept,
            )
            for one in self.beams.trace()
        ]

    def score_of(self, beam: Beam) -> float | None:
        """The beam's score as this request defines it; None where there is none."""
        if self.is_beam_search:
            return beam.total
        if not self.uses_guides:
            return None
        return beam.total / len(beam.tokens) if self.params.score == "mean" else beam.total
