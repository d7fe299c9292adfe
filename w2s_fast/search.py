"""One step of the search for many requests at once: expand, score, select, fork.

A round of a request samples up to L tokens for each candidate, scores them, and keeps the best.
Requests need not be at the same point of their rounds: a step samples as many tokens as the
request nearest to its selection still needs, and scores and selects those that got there.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from w2s_fast.errors import NumericalError
from w2s_fast.guide import PagedGuide
from w2s_fast.kernels.select_beams import select_beams
from w2s_fast.model import PagedModel
from w2s_fast.request import NO_GUIDE_SLOTS, NO_SLOT, Beam, Family, Request
from w2s_fast.sampling import SamplingBatch

# A step samples no more tokens than this before the host looks at them; rows that met EOS are
# carried along until then.
MAX_STEP_TOKENS = 16


class _Source(NamedTuple):
    """A beam whose KV stands, the tokens to append to it, and the candidates that go on from it."""

    beam: Beam
    tokens: list[int]
    children: list[Beam]


class Search:
    """The search over one base and its guides; requests hold their own state."""

    def __init__(
        self,
        base: PagedModel,
        guides: Sequence[PagedGuide],
        vocab_size: int,
        eos_ids: Collection[int],
    ) -> None:
        """``vocab_size``: ids from here on are padding and never sampled."""
        self.base = base
        self.guides = list(guides)
        self.vocab_size = vocab_size
        self.eos_ids = frozenset(eos_ids)

    def step(self, requests: Sequence[Request]) -> None:
        """Bring every request some tokens further; select in those whose round is complete.

        A request in which a model produced NaN or infinity gets its ``error`` and gives its
        pages back; the others are not touched by it.
        """
        for request in requests:
            if not request.families:
                request.open_round()
        self._expand([r for r in requests if r.growing])
        complete = [r for r in requests if r.error is None and r.tokens_left_in_round() == 0]
        self._score([r for r in complete if r.params.uses_guides])
        self._select([r for r in complete if r.error is None])

    def abort(self, request: Request) -> None:
        """Give back all slots of a request."""
        # Within a round the kept beams are the parents of its families.
        parents = [family.parent for family in request.families] or request.beams
        self._release([*parents, *request.candidates])
        request.families = []

    # Expand

    def _expand(self, requests: Sequence[Request]) -> None:
        """Sample the next tokens of every growing candidate."""
        if not requests:
            return
        steps = min(MAX_STEP_TOKENS, *(r.tokens_left_in_round() for r in requests))
        rows = [(request, beam) for request in requests for beam in request.growing]
        sources = [source for request in requests for source in self._sources(request)]
        sampling = SamplingBatch.of(rows, self.base.device)

        # The first token of all children of a beam comes from one row of logits, and only then
        # are they forked: what they share is forwarded once.
        logits = self._first_logits(sources)
        self._fork_base(sources)
        for request in requests:
            request.forked = True
        drawn = [sampling.draw(logits, 0)]
        slots = np.array([beam.slot for _, beam in rows], np.int32)
        one = np.ones(len(rows), np.int32)
        self.base.pool.reserve(slots, one * (steps - 1))
        for step in range(1, steps):
            hidden = self.base.forward(slots, drawn[-1][0], one)
            drawn.append(sampling.draw(self.base.logits(hidden)[:, : self.vocab_size], step))

        tokens, logprobs = (torch.stack(columns, 1).tolist() for columns in zip(*drawn))
        for (request, beam), new, new_logprobs in zip(rows, tokens, logprobs):
            self._take(request, beam, new, new_logprobs)
        self._release_base([beam for _, beam in rows if beam.finished])
        self._abort_failed(requests)

    def _sources(self, request: Request) -> list[_Source]:
        if request.forked:  # in the middle of a round: each candidate goes on by itself
            return [_Source(beam, beam.tokens[-1:], [beam]) for beam in request.growing]
        families = [family for family in request.families if not family.parent.finished]
        if request.round_number > 1:
            return [_Source(f.parent, f.parent.tokens[-1:], f.children) for f in families]
        root = families[0].parent
        root.slot = int(self.base.pool.allocate(1)[0])
        return [_Source(root, request.prompt, families[0].children)]

    def _first_logits(self, sources: Sequence[_Source]) -> Tensor:
        """Append each source's tokens; the logits after the last, once for each child."""
        counts = [len(source.tokens) for source in sources]
        tokens = [token for source in sources for token in source.tokens]
        hidden = self.base.forward(
            [source.beam.slot for source in sources],
            torch.tensor(tokens, dtype=torch.int64, device=self.base.device),
            counts,
        )
        logits = self.base.logits(hidden[np.cumsum(counts) - 1])[:, : self.vocab_size]
        children = torch.tensor([len(s.children) for s in sources], device=logits.device)
        return logits.repeat_interleave(children, dim=0, output_size=int(children.sum()))

    def _fork_base(self, sources: Sequence[_Source]) -> None:
        """Give every child a slot; the first one stays where its parent was."""
        slots = [source.beam.slot for source in sources]
        counts = [len(source.children) - 1 for source in sources]
        others = iter(self.base.pool.fork(slots, counts).tolist())
        for slot, source in zip(slots, sources):
            source.beam.slot = NO_SLOT
            for i, child in enumerate(source.children):
                child.slot = next(others) if i else slot

    def _take(
        self, request: Request, beam: Beam, tokens: Sequence[int], logprobs: Sequence[float]
    ) -> None:
        """Append sampled tokens to a candidate, up to where it ends."""
        for token, logprob in zip(tokens, logprobs):
            if not math.isfinite(logprob):
                request.error = request.error or _not_finite(self.base, len(beam.tokens))
                return
            beam.tokens.append(token)
            beam.logprobs.append(logprob)
            request.sampled_tokens += 1
            params = request.params
            if token in self.eos_ids and not params.ignore_eos:
                beam.finish_reason = "eos"
            elif token in params.stop_token_ids:
                beam.finish_reason = "stop"
            elif len(beam.tokens) == params.max_new_tokens:
                beam.finish_reason = "length"
            if beam.finished:
                return

    # Score

    def _score(self, requests: Sequence[Request]) -> None:
        """Add the guides' log-ratios of the tokens that the round brought."""
        owned = [
            (request, family)
            for request in requests
            for family in request.families
            if not family.parent.finished
        ]
        if not owned:
            return
        rows = [(request, beam) for request, family in owned for beam in family.children]
        chunks = [beam.tokens[len(beam.token_scores) :] for _, beam in rows]
        ends = np.cumsum([len(chunk) for chunk in chunks])
        scores = np.zeros(ends[-1])
        self._prefill_guides([request for request, _ in owned if request.round_number == 1])
        self._fork_guides([family for _, family in owned])
        for g, guide in enumerate(self.guides):
            before = [
                beam.tokens[len(beam.token_scores) - 1]
                if beam.token_scores
                else request.guide_prompts[g][-1]
                for request, beam in rows
            ]
            slots = np.stack([beam.guide_slots[g] for _, beam in rows], axis=1)
            logprobs = [v.double().cpu().numpy() for v in guide.append(slots, before, chunks)]
            for model, values in zip(guide.models, logprobs):
                _check_finite(model, rows, np.split(values, ends[:-1]))
            scores += guide.weight * (logprobs[0] - logprobs[1])
        for (request, beam), new in zip(rows, np.split(scores, ends[:-1])):
            beam.token_scores.extend(new.tolist())
            request.scored_tokens += len(new)
        self._release_guides([beam for _, beam in rows if beam.finished])
        for request in requests:
            _share_scores(request.candidates)
        self._abort_failed(requests)

    def _prefill_guides(self, requests: Sequence[Request]) -> None:
        """Run the prompts of requests in their first round."""
        if not requests:
            return
        slots = [
            guide.prefill([request.guide_prompts[g] for request in requests])
            for g, guide in enumerate(self.guides)
        ]
        for i, request in enumerate(requests):
            request.families[0].parent.guide_slots = np.stack([own[:, i] for own in slots])

    def _fork_guides(self, families: Sequence[Family]) -> None:
        """Give every child slots in all guides; the first one takes its parent's."""
        counts = [len(family.children) - 1 for family in families]
        parents = np.stack([family.parent.guide_slots for family in families], axis=-1)
        forked = np.stack([guide.fork(own, counts) for guide, own in zip(self.guides, parents)])
        for family, others in zip(families, np.split(forked, np.cumsum(counts)[:-1], axis=-1)):
            family.children[0].guide_slots = family.parent.guide_slots
            family.parent.guide_slots = NO_GUIDE_SLOTS
            for i, child in enumerate(family.children[1:]):
                child.guide_slots = others[..., i]

    # Select

    def _select(self, requests: Sequence[Request]) -> None:
        """Keep the best candidates of each request; give back what only losers used."""
        ranked = [request for request in requests if request.params.uses_guides]
        kept = dict(zip((request.index for request in ranked), _rank(ranked)))
        for request in requests:
            candidates = request.candidates
            request.close_round(kept.get(request.index, range(len(candidates))))
            winners = set(map(id, request.beams))
            self._release([beam for beam in candidates if id(beam) not in winners])

    # Slots

    def _abort_failed(self, requests: Iterable[Request]) -> None:
        for request in requests:
            if request.error is not None:
                self.abort(request)

    def _release(self, beams: Sequence[Beam]) -> None:
        self._release_base(beams)
        self._release_guides(beams)

    def _release_base(self, beams: Sequence[Beam]) -> None:
        held = [beam for beam in beams if beam.slot != NO_SLOT]
        self.base.pool.release([beam.slot for beam in held])
        for beam in held:
            beam.slot = NO_SLOT

    def _release_guides(self, beams: Sequence[Beam]) -> None:
        held = [beam for beam in beams if len(beam.guide_slots)]
        if not held:
            return
        for g, guide in enumerate(self.guides):
            guide.release(np.stack([beam.guide_slots[g] for beam in held], axis=1))
        for beam in held:
            beam.guide_slots = NO_GUIDE_SLOTS


def _share_scores(candidates: Sequence[Beam]) -> None:
    """Give candidates with the same tokens the same score, bit for bit.

    They ran in different rows of a batched product; its rounding must not decide between them.
    """
    first: dict[tuple[int, ...], Beam] = {}
    for beam in candidates:
        beam.token_scores = first.setdefault(tuple(beam.tokens), beam).token_scores[:]


def _rank(requests: Sequence[Request]) -> list[list[int]]:
    """For each request, the indices of the candidates it keeps, best first."""
    if not requests:
        return []
    rows = [(r, request, beam) for r, request in enumerate(requests) for beam in request.candidates]
    seen: set[tuple[int, tuple[int, ...]]] = set()
    eligible = []
    for r, request, beam in rows:
        key = (r, tuple(beam.tokens))
        eligible.append(not (request.params.dedup and key in seen))
        seen.add(key)
    winners = select_beams(
        torch.tensor([request.score_of(beam) for _, request, beam in rows], dtype=torch.float64),
        torch.tensor([r for r, _, _ in rows]),
        torch.tensor([request.params.kept for request in requests]),
        torch.tensor(eligible),
    )
    kept: list[list[int]] = [[] for _ in requests]
    for row in winners.tolist():
        r, _, beam = rows[row]
        kept[r].append(beam.index)
    return kept


def _check_finite(
    model: PagedModel,
    rows: Sequence[tuple[Request, Beam]],
    logprobs: Sequence[NDArray[np.float64]],
) -> None:
    """Note an error in the requests whose tokens got a log-prob that is not finite."""
    for (request, beam), values in zip(rows, logprobs):
        broken = np.flatnonzero(~np.isfinite(values))
        if len(broken) and request.error is None:
            request.error = _not_finite(model, len(beam.token_scores) + int(broken[0]))


def _not_finite(model: PagedModel, position: int) -> NumericalError:
    return NumericalError(
        f"model {model.name!r} gave NaN or infinity at position {position} of the response"
    )
