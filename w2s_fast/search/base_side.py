"""The base's side of the search: candidates grow by sampled tokens, in slots of the base."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from w2s_fast.decoding import DecodeGraphs, Decoder, SamplingBatch
from w2s_fast.errors import NumericalError
from w2s_fast.models import PagedModel
from w2s_fast.search.beam import NO_SLOT, Beam
from w2s_fast.search.beginnings import begin
from w2s_fast.search.kinship import family_tree
from w2s_fast.search.recompute import recompute, shared_texts
from w2s_fast.search.request import Request
from w2s_fast.stats import timed


class _Source(NamedTuple):
    """A beam whose KV stands, the tokens to append to it, and the candidates that go on from it."""

    beam: Beam
    tokens: list[int]
    children: list[Beam]


class BaseSide:
    """Expands candidates, and knows which slots they hold in the base.

    Attributes:
        rows, passes: of all decoding passes together.
    """

    def __init__(
        self,
        model: PagedModel,
        vocab_size: int,
        eos_ids: Collection[int],
        graphs: DecodeGraphs | None = None,
    ) -> None:
        """``vocab_size``: ids from here on are padding. ``graphs``: decoding steps."""
        self.model = model
        self.decoder = Decoder(model, vocab_size, graphs)
        self._eos_ids = frozenset(eos_ids)
        self.rows = 0
        self.passes = 0

    def expand(self, requests: Sequence[Request], steps: int) -> None:
        """Sample the next ``steps`` tokens of every growing candidate.

        A request in which the base produced NaN or infinity gets its ``error``.
        """
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
        self.release([beam for _, beam in rows if beam.finished])

    def _decode(
        self,
        requests: Sequence[Request],
        rows: Sequence[tuple[Request, Beam]],
        sources: Sequence[tuple[Request, _Source]],
        logits: Tensor,
        steps: int,
    ) -> None:
        """Fork the sources, and sample all their children's tokens from ``logits`` on."""
        self._fork([source for _, source in sources])
        for request in requests:
            request.forked = True
        sampling = SamplingBatch.of(
            [request.params for request, _ in rows],
            [beam.index for _, beam in rows],
            [len(beam.tokens) for _, beam in rows],
            self.model.device,
        )
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
        held = int(self.model.pool.lengths([root.slot])[0])
        return [_Source(root, request.prompt[held:], families[0].children)]

    def _begin(self, requests: Sequence[Request]) -> None:
        """Give new requests slots, which hold what is cached or what several of them share."""
        # The last token of a prompt is always run with the others' sources: its logits are wanted.
        begun = begin(self.model, [request.prompt[:-1] for request in requests])
        self.rows += sum(begun.rows)
        self.passes += len(begun.rows)
        for request, slot, adopted in zip(requests, begun.slots, begun.adopted):
            request.families[0].parent.slot = int(slot)
            request.stats.cached_tokens += int(adopted)

    def _remember(self, requests: Sequence[Request]) -> None:
        """Let later requests find these prompts; not those that made a model fail."""
        # The first child has its parent's pages.
        slots = [request.families[0].children[0].slot for request in requests]
        self.model.pool.remember(slots, [request.prompt for request in requests])

    def _first_logits(self, sources: Sequence[tuple[Request, _Source]]) -> Tensor:
        """Append each source's tokens; the logits after the last, once for each child."""
        counts = [len(source.tokens) for _, source in sources]
        tokens = [token for _, source in sources for token in source.tokens]
        hidden = self.model.forward(
            [source.beam.slot for _, source in sources],
            torch.tensor(tokens, dtype=torch.int64, device=self.model.device),
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

    def _fork(self, sources: Sequence[_Source]) -> None:
        """Give every child a slot; the first one stays where its parent was."""
        slots = [source.beam.slot for source in sources]
        counts = [len(source.children) - 1 for source in sources]
        others = iter(self.model.pool.fork(slots, counts).tolist())
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
                request.error = request.error or NumericalError.at(
                    self.model.name, len(beam.tokens)
                )
                return
            beam.tokens.append(token)
            beam.logprobs.append(logprob)
            request.sampled_tokens += 1
            params = request.params
            if token in self._eos_ids and not params.ignore_eos:
                beam.finish_reason = "eos"
            elif token in params.stop_token_ids:
                beam.finish_reason = "stop"
            elif len(beam.tokens) == params.max_new_tokens:
                beam.finish_reason = "length"
            if beam.finished:
                return

    def recompute(self, requests: Sequence[Request], alive: Sequence[Sequence[Beam]]) -> None:
        """New slots for the beams of requests that were set aside."""
        shared = [r.shared_tokens for r in requests]
        slots = recompute(self.model, shared_texts([r.prompt for r in requests], alive, shared))
        for beams, own in zip(alive, slots):
            for beam, slot in zip(beams, own.tolist()):
                beam.slot = slot

    def release(self, beams: Sequence[Beam]) -> None:
        """Give back the slots of beams that hold any."""
        held = [beam for beam in beams if beam.slot != NO_SLOT]
        self.model.pool.release([beam.slot for beam in held])
        for beam in held:
            beam.slot = NO_SLOT

    def keep_only(self, beams: Sequence[Beam]) -> None:
        """Give back every slot of the base that none of these beams holds."""
        self.model.pool.release_others([b.slot for b in beams if b.slot != NO_SLOT])
