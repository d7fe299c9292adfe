"""The remote base's side of the search: samples of texts are asked for, and candidates get them.

A chunk ends where the server says that it does, or by what it says. It may end inside a character,
of which then only a replacement has come: that is dropped, and drawn again with the next chunk, for
the next request sends on nothing but what came whole. Where a whole chunk is dropped, or none came,
the next one may be as much longer, and all of it counts: so a search ends.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from hashlib import blake2b
from typing import NamedTuple

from w2s_fast._pages import Beam
from w2s_fast.errors import InvalidRequest, RemoteFailure
from w2s_fast.remote import EOS, Ask, Drawing, Given, Source, to_bytes, to_text
from w2s_fast.result import Sample
from w2s_fast.search.endings import end_texts
from w2s_fast.search.request import Request
from w2s_fast.widths import in_round

_INCOMPLETE = "\ufffd"  # what stands for a character of which bytes are missing
_LARGEST_SEED = 2**63  # servers read seeds as signed integers


class _Counts(NamedTuple):
    """Tokens of a response: all that were sampled for it, and those of chunks that brought none."""

    all: int = 0
    in_vain: int = 0


class _Grown(NamedTuple):
    """What a candidate got: tokens, and as how many ids."""

    tokens: int
    size: int

    def part(self, size: int) -> _Grown:
        """So many of the ids, where the rest is not kept."""
        return _Grown(-(-self.tokens * size // self.size), size) if size < self.size else self


class RemoteSide:
    """Has candidates grow by what a source gives.

    Attributes:
        samples: that have been asked for so far. asked: behind how many texts.
    """

    def __init__(self, source: Source, told: Callable[[], None]) -> None:
        """``told``: called when samples have come, in any thread."""
        self._source = source
        self._told = told
        self._kept: dict[Request, list[_Counts]] = {}
        self._candidates: dict[Request, list[_Counts]] = {}
        self.samples = 0
        self.asked = 0

    def ask(self, requests: Sequence[Request]) -> None:
        """Have samples drawn for the rounds of these. Returns at once."""
        for request in requests:
            assert request.remote is not None
            asks = [self._ask_of(request, *group) for group in self._groups(request)]
            drawing = Drawing(request.beams.round, asks)
            self.samples += sum(ask.samples for ask in asks)
            self.asked += len(asks)
            self._source.draw(request.remote, drawing, self._told)
            request.drawing = drawing

    def take(self, request: Request) -> None:
        """Give its candidates what has come; or the request its error."""
        drawing = request.drawing
        assert drawing is not None
        if drawing.error is not None:
            request.error = drawing.error
            return
        before = self._counts_of(request)
        counts = [before[_parent_of(beam)] for beam in request.beams.candidates]
        lengths = [len(beam.tokens) for beam in request.beams.candidates]
        dropped: set[int] = set()
        came: dict[int, _Grown] = {}
        groups = self._groups(request)
        for (_, members), given in zip(groups, drawing.given):
            for c, sample in zip(members, given.samples):
                came[c] = self._grow(request, c, sample, counts[c], given)
            without = members[len(given.samples) :]
            for c in without:
                request.beams.take_text(c, [], sampled=0, ends=True)
            # The text that they go on from is a candidate where none of them has come.
            dropped.update(without if given.samples else without[1:])
            request.ended_early = request.ended_early or given.ended
        if not came and before == [_Counts()]:
            request.error = InvalidRequest(
                f"{self._source.about}: nothing was sampled: {request.ended_early}; allowed: a "
                "shorter prompt, smaller max_new_tokens or chunk_length, or a larger budget"
            )
            return
        end_texts([request])
        request.beams.pause_growing()
        drawing.dropped = dropped
        candidates = request.beams.candidates
        for c, grown in came.items():
            left = max(0, len(candidates[c].tokens) - lengths[c])
            counts[c] = _grown(counts[c], grown.part(left))
        self._candidates[request] = counts
        drawing.tokens = [own.all for own in counts]
        drawing.taken = True
        request.stats.decode_s += drawing.seconds
        self._check_said(request, candidates)

    def close(self, request: Request, kept: Sequence[int]) -> None:
        """These of the candidates are its hypotheses now, best first."""
        counts, drawing = self._candidates.pop(request), request.drawing
        self._kept[request] = [counts[i] for i in kept]
        request.token_counts = [counts[i].all for i in kept]
        if request.params.trace and drawing is not None:
            request.draws.append(drawing.recorded())
        request.drawing = None

    def start_over(self, request: Request) -> None:
        """The round under way begins again; what was drawn for it still counts."""
        self._candidates.pop(request, None)
        if request.beams.round == 0:
            self._kept.pop(request, None)
        if request.drawing is not None:
            request.drawing.taken = False

    def forget(self, request: Request) -> None:
        """It has ended."""
        drawing, request.drawing = request.drawing, None
        if drawing is not None:
            drawing.cancel()
        self._kept.pop(request, None)
        self._candidates.pop(request, None)

    def keep_only(self, requests: Collection[Request]) -> None:
        """Forget all others; nothing is drawn for them any longer."""
        alive = set(requests)
        self._source.keep_only([r.drawing for r in alive if r.drawing is not None])
        self._kept = {request: own for request, own in self._kept.items() if request in alive}
        self._candidates = {r: own for r, own in self._candidates.items() if r in alive}

    def _groups(self, request: Request) -> list[tuple[int, list[int]]]:
        """Parents that go on, and their candidates.

        Those of a round that was begun, before anything came for it.
        """
        parents = request.beams.kept
        groups: dict[int, list[int]] = {}
        for c, beam in enumerate(request.beams.candidates):
            parent = _parent_of(beam)
            if not parents or parents[parent].finish_reason is None:
                groups.setdefault(parent, []).append(c)
        return list(groups.items())

    def _ask_of(self, request: Request, parent: int, members: Sequence[int]) -> Ask:
        number, params = request.beams.round, request.params
        parents = request.beams.kept
        counts = self._counts_of(request)[parent]
        left = params.max_new_tokens - counts.all
        # Where nobody chooses between them, texts need not come in chunks.
        chunk = left
        if params.uses_guides:
            chunk = min(left, in_round(params.widths.chunks, number) + counts.in_vain)
        behind = to_text(parents[parent].tokens) if parents else ""
        return Ask(behind, len(members), chunk, _seed(params.seed, number, parent))

    def _counts_of(self, request: Request) -> list[_Counts]:
        """Of what its candidates go on from."""
        return self._kept.get(request, [_Counts()])

    def _grow(
        self, request: Request, candidate: int, sample: Sample, counts: _Counts, given: Given
    ) -> _Grown:
        """Give a candidate what was sampled for it, up to where its chunk ends."""
        assert request.remote is not None
        most = request.params.max_new_tokens - counts.all
        ends = sample.finish_reason != "length"
        found = _Grown(max(1, sample.tokens), 0)  # so that a search ends, whatever a server says
        last = found.tokens >= most
        text = sample.text if ends or last else sample.text.rstrip(_INCOMPLETE)
        ids = to_bytes(text) + [EOS] * ends
        found = found._replace(size=len(ids))
        if (breaks := request.remote.breaks) is not None:
            before = request.beams.candidates[candidate].tokens
            if (end := breaks.find([*before, *ids], len(before))) is not None:
                ids = ids[: end - len(before)]
                found = found.part(len(ids))
        over = found.tokens >= most or given.ended is not None
        request.beams.take_text(candidate, ids, sampled=sample.tokens, ends=over)
        return found

    def _check_said(self, request: Request, candidates: Sequence[Beam]) -> None:
        """RemoteFailure where all that the server has sampled is no text."""
        if request.ended_early is None and all(
            beam.finish_reason == "length" and not beam.tokens for beam in candidates
        ):
            request.error = RemoteFailure(
                f"{self._source.about}: no text came in {request.params.max_new_tokens} tokens; "
                "where it thinks first, have it not do so (extra_body), or give max_new_tokens and "
                "chunk_length room for that"
            )


def _parent_of(beam: Beam) -> int:
    """Of the parent among those that a round goes on from."""
    return beam.parent or 0


def _grown(counts: _Counts, new: _Grown) -> _Counts:
    return _Counts(counts.all + new.tokens, 0 if new.size else counts.in_vain + new.tokens)


def _seed(seed: int, number: int, parent: int) -> int:
    """The request's own for its prompt; each other text gets one that follows from it."""
    if number == 1 and seed < _LARGEST_SEED:
        return seed
    digest = blake2b(f"{seed} {number} {parent}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") & 0x7FFFFFFF
