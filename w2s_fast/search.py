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
from torch import Tensor

from w2s_fast.beginnings import begin
from w2s_fast.decode_graphs import DecodeGraphs
from w2s_fast.decoder import Decoder
from w2s_fast.errors import NumericalError
from w2s_fast.guide import PagedGuide
from w2s_fast.kinship import family_tree, shared_texts
from w2s_fast.model import PagedModel
from w2s_fast.pages import Int32Array
from w2s_fast.request import NO_GUIDE_SLOTS, NO_SLOT, Beam, Family, Request
from w2s_fast.sampling import SamplingBatch
from w2s_fast.selection import choose, new_tokens
from w2s_fast.stats import timed

# A step samples no more tokens than this before the host looks at them; rows that met EOS are
# carried along until then.
MAX_STEP_TOKENS = 16
# A step samples at least this many tokens, as long as some chunk asks for them: with chunks of many
# lengths the guides would otherwise run after nearly every token.
LEAST_STEP_TOKENS = 4


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
        graphs: DecodeGraphs | None = None,
    ) -> None:
        """``vocab_size``: ids from here on are padding. ``graphs``: decoding steps of the base."""
        self.base = base
        self.guides = list(guides)
        self.vocab_size = vocab_size
        self.decoder = Decoder(base, vocab_size, graphs)
        self.eos_ids = frozenset(eos_ids)
        self.rows = 0  # of all decoding passes together
        self.passes = 0

    @property
    def models(self) -> list[PagedModel]:
        """The base and the guides' models, each with its own pages."""
        return [self.base, *(model for guide in self.guides for model in guide.models)]

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
            self._expand(growing, count)
            tokens -= count
        complete = [r for r in requests if r.error is None and r.tokens_left_in_round() == 0]
        scored = [r for r in complete if r.params.uses_guides]
        new = [r for r in scored if r.round_number == 1]
        with timed("prefill_s", [r.stats for r in new]):
            self._prefill_guides(new)
        with timed("scoring_s", [r.stats for r in scored]):
            self._score(scored)
        for request in complete:
            if not request.params.uses_guides:
                self._close_round(request, range(len(request.candidates)))

    def set_aside(self, request: Request) -> None:
        """Give back all slots of a request between two rounds; its next step recomputes them."""
        self._release(request.beams)
        request.aside = True

    def abort(self, request: Request) -> None:
        """Give back all slots of a request."""
        # Within a round the kept beams are the parents of its families.
        parents = [family.parent for family in request.families] or request.beams
        self._release([*parents, *request.candidates])
        request.families = []
        request.aside = False

    # Expand

    def _expand(self, requests: Sequence[Request], steps: int) -> None:
        """Sample the next ``steps`` tokens of every growing candidate."""
        rows = [(request, beam) for request in requests for beam in request.growing]
        begun = [r for r in requests if r.round_number == 1 and not r.forked]
        new = [r.stats for r in begun]
        old = [r.stats for r in requests if r.round_number > 1 or r.forked]
        if begun:
            with timed("prefill_s", new):
                self._begin(begun)
        sources = [(request, source) for request in requests for source in self._sources(request)]
        # The first token of all children of a beam comes from one row of logits, and only then
        # are they forked: what they share is forwarded once.
        with timed("prefill_s", new), timed("decode_s", old):
            logits = self._first_logits(sources)
        with timed("decode_s", new + old):
            self._decode(requests, rows, sources, logits, steps)
        self._remember([r for r in begun if r.error is None])
        self._release_base([beam for _, beam in rows if beam.finished])
        self._abort_failed(requests)

    def _decode(
        self,
        requests: Sequence[Request],
        rows: Sequence[tuple[Request, Beam]],
        sources: Sequence[tuple[Request, _Source]],
        logits: Tensor,
        steps: int,
    ) -> None:
        """Fork the sources, and sample all their children's tokens from ``logits`` on."""
        self._fork_base([source for _, source in sources])
        for request in requests:
            request.forked = True
        sampling = SamplingBatch.of(rows, self.base.device)
        slots = np.array([beam.slot for _, beam in rows], np.int32)
        tree = family_tree(rows, [len(request.prompt) for request, _ in rows])
        drawn = self.decoder.run(slots, tree, sampling, logits, steps)
        self.rows += len(sources) + len(rows) * (steps - 1)
        self.passes += steps

        # The one place where the host waits for the device.
        tokens, logprobs = (torch.stack(columns, 1).tolist() for columns in zip(*drawn))
        for (request, beam), new, new_logprobs in zip(rows, tokens, logprobs):
            self._take(request, beam, new, new_logprobs)

    def _sources(self, request: Request) -> list[_Source]:
        if request.forked:  # in the middle of a round: each candidate goes on by itself
            return [_Source(beam, beam.tokens[-1:], [beam]) for beam in request.growing]
        families = [family for family in request.families if not family.parent.finished]
        if request.round_number > 1:
            return [_Source(f.parent, f.parent.tokens[-1:], f.children) for f in families]
        root = families[0].parent
        held = int(self.base.pool.lengths([root.slot])[0])
        return [_Source(root, request.prompt[held:], families[0].children)]

    def _begin(self, requests: Sequence[Request]) -> None:
        """Give new requests slots, which hold what is cached or what several of them share."""
        # The last token of a prompt is always run with the others' sources: its logits are wanted.
        begun = begin(self.base, [request.prompt[:-1] for request in requests])
        self.rows += sum(begun.rows)
        self.passes += len(begun.rows)
        for request, slot, adopted in zip(requests, begun.slots, begun.adopted):
            request.families[0].parent.slot = int(slot)
            request.stats.cached_tokens += int(adopted)

    def _remember(self, requests: Sequence[Request]) -> None:
        """Let later requests find these prompts; not those that made a model fail."""
        # The first child has its parent's pages.
        slots = [request.families[0].children[0].slot for request in requests]
        self.base.pool.remember(slots, [request.prompt for request in requests])

    def _first_logits(self, sources: Sequence[tuple[Request, _Source]]) -> Tensor:
        """Append each source's tokens; the logits after the last, once for each child."""
        counts = [len(source.tokens) for _, source in sources]
        tokens = [token for _, source in sources for token in source.tokens]
        hidden = self.base.forward(
            [source.beam.slot for _, source in sources],
            torch.tensor(tokens, dtype=torch.int64, device=self.base.device),
            counts,
            family_tree(
                [(request, source.beam) for request, source in sources],
                # A new request's prompt is yet to be run.
                [len(request.prompt) * bool(source.beam.tokens) for request, source in sources],
            ),
        )
        logits = self.decoder.logits(hidden[np.cumsum(counts) - 1])
        children = torch.tensor([len(s.children) for _, s in sources], device=logits.device)
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
                request.error = request.error or NumericalError.at(self.base.name, len(beam.tokens))
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
        """Score the tokens that the round brought, and keep the best candidates."""
        if not requests:
            return
        owned = [
            (request, family)
            for request in requests
            for family in request.families
            if not family.parent.finished
        ]
        self._fork_guides([family for _, family in owned])
        tuned, untuned = self._guide_logprobs(
            [(request, beam) for request, family in owned for beam in family.children]
        )
        beams = [beam for request in requests for beam in request.candidates]
        chunks = [new_tokens(beam) for beam in beams]
        weights = [guide.weight for guide in self.guides]
        choice = choose(requests, chunks, tuned, untuned, weights)
        owners = [request for request in requests for _ in request.candidates]
        for request, beam, broken in zip(owners, beams, choice.broken):
            if broken is not None and request.error is None:
                model = self._first_broken(tuned[:, broken.token], untuned[:, broken.token])
                position = len(beam.token_scores) + broken.offset
                request.error = NumericalError.at(model.name, position)
        for request, beam, new, score in zip(owners, beams, choice.token_scores, choice.scores):
            beam.token_scores.extend(new)
            beam.total = score
            request.scored_tokens += len(new)
        for request, kept in zip(requests, choice.kept):
            if request.error is None:
                if request.round_number == 1:
                    self._remember_guides(request)
                self._close_round(request, kept)
        self._abort_failed(requests)

    def _guide_logprobs(self, rows: Sequence[tuple[Request, Beam]]) -> tuple[Tensor, Tensor]:
        """Run the rows' new tokens through all guides: float32 [guides, T], tuned and untuned."""
        chunks = [new_tokens(beam) for _, beam in rows]
        found = []
        for g, guide in enumerate(self.guides):
            before = [
                beam.tokens[len(beam.token_scores) - 1]
                if beam.token_scores
                else request.guide_prompts[g][-1]
                for request, beam in rows
            ]
            slots = np.stack([beam.guide_slots[g] for _, beam in rows], axis=1)
            # The guides' last token of the prompt is run with the first chunk.
            prompts = [len(request.guide_prompts[g]) - 1 for request, _ in rows]
            found.append(guide.append(slots, before, chunks, family_tree(rows, prompts)))
        tuned, untuned = (torch.stack(logprobs) for logprobs in zip(*found))
        return tuned, untuned

    def _first_broken(self, tuned: Tensor, untuned: Tensor) -> PagedModel:
        """The first model whose log-prob, one for each guide, is not finite."""
        finite = torch.stack([tuned, untuned], 1).isfinite().tolist()
        return next(
            model
            for guide, both in zip(self.guides, finite)
            for model, sound in zip(guide.models, both)
            if not sound
        )

    def _prefill_guides(self, requests: Sequence[Request]) -> None:
        """Run the prompts of requests in their first round."""
        if not requests:
            return
        roots = [request.families[0].parent for request in requests]
        for root in roots:
            root.guide_slots = self._no_guide_slots()
        for g, guide in enumerate(self.guides):
            slots = guide.prefill([request.guide_prompts[g] for request in requests])
            for root, own in zip(roots, slots.T):
                root.guide_slots[g] = own

    def _remember_guides(self, request: Request) -> None:
        """Let later requests find this prompt in the guides, too."""
        slots = request.families[0].children[0].guide_slots
        for g, guide in enumerate(self.guides):
            for model, slot in zip(guide.models, slots[g]):
                model.pool.remember([slot], [request.guide_prompts[g][:-1]])

    def _fork_guides(self, families: Sequence[Family]) -> None:
        """Give every child slots in all guides; the first one takes its parent's."""
        counts = [len(family.children) - 1 for family in families]
        others = [child for family in families for child in family.children[1:]]
        for child in others:
            child.guide_slots = self._no_guide_slots()
        for g, guide in enumerate(self.guides):
            parents = np.stack([family.parent.guide_slots[g] for family in families], axis=1)
            for child, own in zip(others, guide.fork(parents, counts).T):
                child.guide_slots[g] = own
        for family in families:
            family.children[0].guide_slots = family.parent.guide_slots
            family.parent.guide_slots = NO_GUIDE_SLOTS

    def _no_guide_slots(self) -> Int32Array:
        return np.full((len(self.guides), 2), NO_SLOT, np.int32)

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
            self._recompute(requests)
        for request in requests:
            request.aside = False

    def _recompute(self, requests: Sequence[Request]) -> None:
        alive = [[beam for beam in r.beams if not beam.finished] for r in requests]
        shared = [r.shared_tokens for r in requests]
        prompts = [r.prompt for r in requests]
        slots = self.base.recompute(shared_texts(prompts, alive, shared))
        for beams, own in zip(alive, slots):
            for beam, slot in zip(beams, own.tolist()):
                beam.slot = slot
        guided = [i for i, r in enumerate(requests) if r.params.uses_guides]
        for g, guide in enumerate(self.guides):
            prompts = [requests[i].guide_prompts[g] for i in guided]
            groups = shared_texts(prompts, [alive[i] for i in guided], [shared[i] for i in guided])
            for m, model in enumerate(guide.models):
                for i, own in zip(guided, model.recompute(groups)):
                    for beam, slot in zip(alive[i], own.tolist()):
                        if not len(beam.guide_slots):
                            beam.guide_slots = self._no_guide_slots()
                        beam.guide_slots[g, m] = slot

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
            for m, model in enumerate(guide.models):
                own = np.array([beam.guide_slots[g, m] for beam in held], np.int32)
                model.pool.release(own[own != NO_SLOT])  # a failed recomputation leaves gaps
        for beam in held:
            beam.guide_slots = NO_GUIDE_SLOTS


def _step_tokens(left: Sequence[int]) -> int:
    """How many tokens a step samples, given how many the rounds of its requests still need.

    Up to the end of the last chunk that ends soon after the first one: their guides then run
    together, and the candidates that are done wait for the others.
    """
    nearest = min((tokens for tokens in left if tokens > 0), default=0)
    soon = max(nearest + nearest // 2, LEAST_STEP_TOKENS)
    return min(max((tokens for tokens in left if tokens <= soon), default=nearest), MAX_STEP_TOKENS)
