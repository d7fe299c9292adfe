"""Random rounds for score_select: chunks as they were drawn, and the same cut by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.beams import DEVICE, RoundOfOne, naive, one_round, run, same
from w2s_fast.kernels.linear_logprob import linear_logprob
from w2s_fast.kernels.linear_logprob_partials import Partials, linear_logprob_partials
from w2s_fast.kernels.score_select import ScoreSelection, score_select
from w2s_fast.kernels.select_beams import Selection


@dataclass
class DrawnRound:
    """A round of one request before anybody has looked where its chunks end."""

    whole: RoundOfOne  # all that was drawn
    stops: list[int]  # ids that end a response
    base: list[list[float]]  # [candidate][token], log-probs

    @property
    def counts(self) -> list[int]:
        """For each candidate how many tokens there are up to the first that ends it."""
        return [
            next((i + 1 for i, token in enumerate(chunk) if token in self.stops), len(chunk))
            for chunk in self.whole.chunks
        ]

    def cut(self) -> RoundOfOne:
        def each(rows: Sequence[Any]) -> list[Any]:
            return [row[:n] for row, n in zip(rows, self.counts)]

        r = self.whole
        return replace(
            r,
            chunks=each(r.chunks),
            tuned=[each(guide) for guide in r.tuned],
            untuned=[each(guide) for guide in r.untuned],
        )


@dataclass
class Spare:
    """What of a larger bucket nobody uses: arguments that are longer than need be, and bounds."""

    rounds: int = 0
    candidates: int = 0
    tokens: int = 0
    stops: int = 0
    max_candidates: int = 0
    max_width: int = 0


@dataclass
class Call:
    """score_select's arguments for some rounds, on the device."""

    arguments: tuple[Any, ...]
    size: tuple[int, int, int, int]  # R, C, T, W

    def run(self) -> ScoreSelection:
        return ScoreSelection.unpack(score_select(*self.arguments).cpu(), *self.size)

    @property
    def of_operator(self) -> tuple[Any, ...]:
        """The same for the operator itself."""
        guides, weights, tokens, *rest = self.arguments
        models = [partials for pair in guides for partials in pair]
        return (tokens, *map(list, zip(*models)), weights, *rest)


def call_of(
    rounds: list[DrawnRound],
    weights: list[float],
    spare: Spare | None = None,
    guides: list[tuple[Partials, Partials]] | None = None,
) -> Call:
    """``guides``: in place of finished log-probs, the rounds' own."""
    spare = spare or Spare()
    whole = [r.whole for r in rounds]
    chunks = [chunk for r in whole for chunk in r.chunks]

    def column(values: list[Any], dtype: torch.dtype, more: int, rest: Any) -> Tensor:
        return torch.tensor(values + [rest] * more, dtype=dtype).to(DEVICE)

    def cumulative(counts: list[int], more: int) -> Tensor:
        return torch.tensor([0, *counts, *[0] * more]).cumsum(0).to(DEVICE)

    def per_token(rows: list[list[list[float]]]) -> Tensor:
        flat = [x for candidates in rows for tokens in candidates for x in tokens]
        return column(flat, torch.float32, spare.tokens, math.nan)

    if guides is None:
        guides = [
            (
                Partials.of_logprobs(per_token([r.tuned[g] for r in whole])),
                Partials.of_logprobs(per_token([r.untuned[g] for r in whole])),
            )
            for g in range(len(weights))
        ]
    tokens = column([t for chunk in chunks for t in chunk], torch.int64, spare.tokens, -7)
    more, i64 = spare.candidates, torch.int64
    max_width = max(r.width for r in whole) + spare.max_width
    arguments = (
        guides,
        torch.tensor(weights, dtype=torch.float64).to(DEVICE),
        tokens,
        per_token([r.base for r in rounds]),
        cumulative([len(chunk) for chunk in chunks], more),
        column([x for r in whole for x in r.previous], torch.float64, more, math.inf),
        column([b for r in whole for b in r.before], i64, more, 0),
        column([p for r in whole for p in r.parents], torch.int32, more, -9),
        column([s for r in whole for s in r.siblings], i64, more, 0),
        cumulative([len(r.chunks) for r in whole], spare.rounds),
        column([t for r in rounds for t in r.stops], i64, spare.stops, 1),
        cumulative([len(r.stops) for r in rounds], spare.rounds),
        column([r.width for r in whole], i64, spare.rounds, 3),
        column([r.mean for r in whole], torch.bool, spare.rounds, True),
        column([r.dedup for r in whole], torch.bool, spare.rounds, True),
        max(len(r.chunks) for r in whole) + spare.max_candidates,
        max_width,
    )
    size = (len(rounds) + spare.rounds, len(chunks) + more, len(tokens), max_width)
    return Call(arguments, size)


@st.composite
def drawn_round(draw: st.DrawFn, guides: int, **limits: int) -> DrawnRound:
    whole = draw(one_round(guides, **limits))
    logprob = st.one_of(
        st.floats(-9, 0, width=32),
        st.sampled_from([math.nan, -math.inf, math.inf] if draw(st.booleans()) else [-1.0]),
    )
    return DrawnRound(
        whole,
        # Some that are drawn often, some never.
        draw(st.lists(st.integers(0, 60) | st.integers(0, 2), max_size=4)),
        [draw(st.lists(logprob, min_size=len(c), max_size=len(c))) for c in whole.chunks],
    )


@st.composite
def drawn_rounds(draw: st.DrawFn, **limits: int) -> tuple[list[DrawnRound], list[float]]:
    guides = draw(st.integers(1, 3))
    weights = draw(st.lists(st.sampled_from([1.0, 0.3, -2.0]), min_size=guides, max_size=guides))
    return draw(st.lists(drawn_round(guides, **limits), min_size=1, max_size=4)), weights


few = st.integers(0, 3)
spares = st.builds(
    Spare, few, few, few, few, st.sampled_from([0, 1, 20, 200]), st.sampled_from([0, 1, 5])
)


def check(rounds: list[DrawnRound], weights: list[float], spare: Spare | None = None) -> None:
    """Against the naive selection, and bit for bit against select_beams on cut chunks."""
    found = call_of(rounds, weights, spare).run()
    cut = [r.cut() for r in rounds]
    assert_same_as_apart(found, rounds, run(cut, weights))

    scores = iter(found.scores.tolist())
    for i, r in enumerate(cut):
        expected = naive(r, weights)
        same([next(scores) for _ in r.chunks], expected.scores)
        kept = found.kept[i].tolist()
        assert kept == expected.kept + [-1] * (len(kept) - len(expected.kept))


@st.composite
def vocabularies(draw: st.DrawFn) -> list[int]:
    """Of the models of three guides: one tile of a kernel, or several."""
    return draw(st.lists(st.sampled_from([61, 64, 130, 300]), min_size=3, max_size=3))


def check_from_hidden_states(
    rounds: list[DrawnRound],
    weights: list[float],
    spare: Spare,
    vocabularies: list[int],
) -> None:
    """Against linear_logprob and select_beams one after the other, bit for bit.

    Hidden states are of all that was drawn: where a chunk ends is not known when a model runs.
    """
    draw = torch.Generator().manual_seed(0)
    tokens: Tensor = call_of(rounds, weights, spare).arguments[2].clamp(min=0)
    models = [
        (
            torch.randn(len(tokens), 24, generator=draw).to(DEVICE),
            torch.randn(vocabulary, 24, generator=draw).to(DEVICE),
        )
        for vocabulary in vocabularies[: len(weights)]
        for _ in ("tuned", "untuned")
    ]
    halves = [linear_logprob_partials(*model, tokens, vocab_size=60) for model in models]
    call = call_of(rounds, weights, spare, list(zip(halves[::2], halves[1::2])))

    own = own_tokens(rounds)
    logprobs = [linear_logprob(*model, tokens, vocab_size=60)[own] for model in models]
    both = torch.stack(logprobs[::2]), torch.stack(logprobs[1::2])
    apart = run([r.cut() for r in rounds], weights, logprobs=both)
    assert_same_as_apart(call.run(), rounds, apart)


def own_tokens(rounds: list[DrawnRound]) -> list[int]:
    """Indices, among all that was drawn, of tokens that are not behind the end of their chunk."""
    lengths = [len(chunk) for r in rounds for chunk in r.whole.chunks]
    counts = [n for r in rounds for n in r.counts]
    starts = itertools.accumulate(lengths, initial=0)
    return [start + i for start, n in zip(starts, counts) for i in range(n)]


def assert_same_as_apart(found: ScoreSelection, rounds: list[DrawnRound], apart: Selection) -> None:
    """``apart``: of select_beams, given the same rounds with their chunks cut."""
    chunks = [chunk for r in rounds for chunk in r.whole.chunks]
    base = [x for r in rounds for row in r.base for x in row]
    counts = [n for r in rounds for n in r.counts]
    used, rows = len(counts), len(rounds)
    assert found.counts[:used].tolist() == counts
    starts = [sum(map(len, chunks[:c])) for c in range(used + 1)]
    own = own_tokens(rounds)
    behind = sorted({*range(starts[-1])} - {*own})

    same_bits(found.scores[:used], apart.scores)
    same_bits(found.token_scores[own], apart.token_scores)
    assert not found.token_scores[behind].any()
    width = apart.kept.shape[1]
    for wide, narrow in ((found.kept, apart.kept), (found.parents, apart.parents)):
        assert wide[:rows, :width].tolist() == narrow.tolist()
        assert (wide[:rows, width:] == -1).all()
        assert (wide[rows:] == -1).all()
    broken = [-1 if token < 0 else own[token] for token in apart.broken.tolist()]
    assert found.broken[:used].tolist() == broken
    assert found.broken_base[:used].tolist() == [
        next((t for t in range(start, start + n) if not math.isfinite(base[t])), -1)
        for start, n in zip(starts, counts)
    ]
    assert found.tokens[: starts[-1]].tolist() == [t for chunk in chunks for t in chunk]
    same_bits(found.logprobs[: starts[-1]], torch.tensor(base).double())


def same_bits(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert torch.equal(found.isnan(), expected.isnan())
    sound = ~found.isnan()
    assert torch.equal(found[sound].view(torch.int64), expected[sound].view(torch.int64))
