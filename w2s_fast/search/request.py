"""One request under way: its prompt, its beams, and what has been recorded of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from w2s_fast.cache import Int32Array
from w2s_fast.errors import W2SFastError
from w2s_fast.params import SearchParams
from w2s_fast.result import Candidate, Round
from w2s_fast.search.beam import Beam, Family
from w2s_fast.stats import RequestStats


class Request:
    """A prompt, its parameters, and the state of its search."""

    def __init__(
        self,
        prompt: Sequence[int],
        guide_prompts: Sequence[tuple[Sequence[int], Sequence[int]]],
        params: SearchParams,
        priority: int = 0,
    ) -> None:
        """``prompt``: the base's tokens, at least one; ``guide_prompts``: for each guide those of
        its tuned model and those of its untuned one.

        ``priority``: the lower, the sooner.
        """
        self.prompt = list(prompt)
        self.guide_prompts = [(list(tuned), list(untuned)) for tuned, untuned in guide_prompts]
        self.params = params
        self.priority = priority
        self.urgency = (0, 0)  # the scheduler's: smaller numbers run first
        self.promised: list[int] = []  # pages of the round under way, as the scheduler counts them
        self.beams: list[Beam] = []
        self.families: list[Family] = []
        self.aside = False  # its slots were given up between two rounds
        self.forked = False  # whether this round's candidates have slots of their own
        self.rounds: list[Round] = []
        self.round_number = 0
        self._common: Int32Array = np.zeros((0, 0), np.int32)
        self.sampled_tokens = 0
        self.scored_tokens = 0
        self.stats = RequestStats()
        self.streams = False  # whether somebody wants to know what its hypotheses agree on
        self.agreed: list[int] = []  # that, after the last step it took part in
        # Called between two steps, after each it took part in and when it has ended; by the thread
        # that took the step, so it must not wait for anything.
        self.listener: Callable[[], None] | None = None
        self.error: W2SFastError | None = None
        self.ended = False  # its pages are free, and its result can be read

    @property
    def candidates(self) -> list[Beam]:
        """The candidates of the round under way, in the order of their indices."""
        return [child for family in self.families for child in family.children]

    @property
    def growing(self) -> list[Beam]:
        """The candidates that still sample tokens; all have the same number of them."""
        return [beam for beam in self.candidates if not beam.finished]

    @property
    def done(self) -> bool:
        """Whether its search has ended: by its hypotheses, or by an error."""
        if self.error is not None:
            return True
        return not self.families and bool(self.beams) and all(b.finished for b in self.beams)

    @property
    def holds(self) -> bool:
        """Whether it holds slots: it has begun, and was not set aside since."""
        return bool(self.families) or (bool(self.beams) and not self.aside)

    @property
    def holders(self) -> list[Beam]:
        """The beams that may hold slots. Within a round the kept are the families' parents."""
        parents = [family.parent for family in self.families] or self.beams
        return [*parents, *self.candidates] if self.holds else []

    def open_round(self) -> None:
        """Make the candidates of the next round from the kept beams, or from the prompt."""
        params = self.params
        self.round_number += 1
        self.forked = False
        if not self.beams:
            root = Beam(None, 0, 0, [], [], [], None)
            children = [root.child(None, i) for i in range(params.first_candidates)]
            self.families = [Family(root, children)]
            return
        self.families = []
        index = 0
        for position, beam in enumerate(self.beams):
            held = beam.finished and params.finished == "hold"
            count = 1 if held else params.successors
            children = [beam.child(position, index + i) for i in range(count)]
            self.families.append(Family(beam, children))
            index += count

    def tokens_left_in_round(self) -> int:
        """How many tokens each growing candidate samples until the selection; 0: none."""
        growing = self.growing
        if not growing:
            return 0
        length = len(growing[0].tokens)
        end = self.round_start + self.params.tokens_per_round
        return min(end, self.params.max_new_tokens) - length

    def agreed_tokens(self) -> list[int]:
        """The longest common prefix of all hypotheses; no EOS among it as long as one goes on."""
        texts = [beam.tokens for beam in self.candidates or self.beams]
        if not texts:
            return []
        first, last = min(texts), max(texts)  # what these two share is shared by all between
        pairs = enumerate(zip(first, last))
        return first[: next((i for i, (a, b) in pairs if a != b), min(len(first), len(last)))]

    @property
    def round_start(self) -> int:
        """Response tokens that growing candidates had when the round was opened."""
        return next(len(f.parent.tokens) for f in self.families if not f.parent.finished)

    def close_round(self, kept: Sequence[int]) -> None:
        """Keep the candidates with indices ``kept``, best first, and record the round."""
        candidates = self.candidates
        self.stats.rounds += 1
        if self.params.trace:
            recorded = [
                Candidate(c.parent, list(c.tokens), self.score_of(c), c.finish_reason)
                for c in candidates
            ]
            self.rounds.append(Round(recorded, list(kept)))
        self._remember_kinship([candidates[i] for i in kept])
        self.beams = [candidates[i] for i in kept]
        self.families = []

    @property
    def shared_tokens(self) -> int:
        """How many of their first tokens all kept beams that are not finished have in common.

        By descent: tokens that came out equal by chance do not count, their keys may differ in
        the last bits. 0 in the first round.
        """
        alive = [i for i, beam in enumerate(self.beams) if not beam.finished]
        return int(self._common[np.ix_(alive, alive)].min(initial=2**31 - 1)) if alive else 0

    def _remember_kinship(self, kept: Sequence[Beam]) -> None:
        """Up to where each two of the kept beams have the same ancestor; before ``beams`` change.

        Beams of the same parent share what they inherited, others what their parents shared.
        """
        parents = np.array([-1 if beam.parent is None else beam.parent for beam in kept], np.int64)
        inherited = np.array([beam.inherited for beam in kept], np.int32)
        common = np.broadcast_to(inherited[:, None], (len(kept), len(kept))).copy()
        cousins = parents[:, None] != parents
        if cousins.any():
            common[cousins] = self._common[np.ix_(parents, parents)][cousins]
        np.fill_diagonal(common, [len(beam.tokens) for beam in kept])
        self._common = common

    def score_of(self, beam: Beam) -> float | None:
        """The beam's score as this request defines it; None where no guide runs."""
        if not self.params.uses_guides:
            return None
        return beam.total / len(beam.tokens) if self.params.score == "mean" else beam.total
