"""Random rounds for select_beams, and the selection written naively in Python floats."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from w2s_fast.kernels.library import BACKEND
from w2s_fast.kernels.select_beams import Selection, select_beams

Chunk = tuple[int, ...]
# An interpreter runs on the CPU, whatever else there is.
DEVICE = "cuda" if BACKEND == "auto" and torch.cuda.is_available() else "cpu"


@dataclass
class RoundOfOne:
    """The candidates of one request: what the operator is told of them."""

    chunks: list[Chunk]  # empty for a held finished hypothesis
    siblings: list[int]
    previous: list[float]
    before: list[int]  # response tokens before the chunk
    parents: list[int]
    tuned: list[list[list[float]]]  # [guide][candidate][token]
    untuned: list[list[list[float]]]
    width: int
    mean: bool
    dedup: bool


def run(
    rounds: list[RoundOfOne],
    weights: list[float],
    above: tuple[int, int] = (0, 0),
    logprobs: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Selection:
    """One call for all requests.

    ``above``: how far the bounds of candidates and width lie. ``logprobs``: tuned and untuned,
    float32 [G, T], in place of the rounds' own.
    """
    chunks = [chunk for r in rounds for chunk in r.chunks]

    def flat(guide: int, which: str) -> list[float]:
        return [x for r in rounds for row in getattr(r, which)[guide] for x in row]

    if logprobs is None:
        guides = range(len(weights))
        tuned = torch.tensor([flat(g, "tuned") for g in guides])
        logprobs = tuned, torch.tensor([flat(g, "untuned") for g in guides])

    def cumulative(counts: list[int]) -> torch.Tensor:
        return torch.tensor([0, *counts]).cumsum(0)

    arguments = (
        *logprobs,
        torch.tensor(weights, dtype=torch.float64),
        torch.tensor([t for chunk in chunks for t in chunk], dtype=torch.int64),
        cumulative([len(chunk) for chunk in chunks]),
        torch.tensor([x for r in rounds for x in r.previous], dtype=torch.float64),
        torch.tensor([b + len(c) for r in rounds for b, c in zip(r.before, r.chunks)]),
        torch.tensor([p for r in rounds for p in r.parents], dtype=torch.int32),
        torch.tensor([s for r in rounds for s in r.siblings], dtype=torch.int64),
        cumulative([len(r.chunks) for r in rounds]),
        torch.tensor([r.width for r in rounds]),
        torch.tensor([r.mean for r in rounds]),
        torch.tensor([r.dedup for r in rounds]),
    )
    largest = max(len(r.chunks) for r in rounds), max(r.width for r in rounds)
    bounds = (bound + more for bound, more in zip(largest, above))
    found = select_beams(*(x.to(DEVICE) for x in arguments), *bounds)
    return Selection(*(x.cpu() for x in found))


@dataclass
class Naive:
    """The same for one request, from the definition."""

    token_scores: list[float]
    scores: list[float]
    kept: list[int]
    broken: list[int | None]  # index within the candidate's chunk


def naive(r: RoundOfOne, weights: list[float]) -> Naive:
    per_candidate = []
    for c in range(len(r.chunks)):
        per_candidate.append(
            [
                sum(
                    w * (f32(r.tuned[g][c][t]) - f32(r.untuned[g][c][t]))
                    for g, w in enumerate(weights)
                )
                for t in range(len(r.chunks[c]))
            ]
        )
    broken = [
        next((t for t, x in enumerate(scores) if not math.isfinite(x)), None)
        for scores in per_candidate
    ]
    own = [p + sum(scores) for p, scores in zip(r.previous, per_candidate)]
    identity = list(zip(r.siblings, r.chunks))
    first = [identity.index(i) for i in identity]
    scores = [own[f] for f in first]

    def rank_by(c: int) -> float:
        value = scores[c] / (r.before[c] + len(r.chunks[c])) if r.mean else scores[c]
        return value if math.isfinite(value) else -math.inf

    allowed = [c for c in range(len(own)) if not r.dedup or first[c] == c]
    kept = sorted(allowed, key=lambda c: (-rank_by(c), c))[: r.width]
    return Naive([x for s in per_candidate for x in s], scores, kept, broken)


def f32(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float32))


@st.composite
def one_round(draw: st.DrawFn, guides: int, *, most: int = 20, longest: int = 20) -> RoundOfOne:
    """Few distinct tokens, values and parents, so that duplicates and ties are common."""
    count = draw(st.integers(1, most))
    length = draw(st.integers(1, longest))
    vocabulary = draw(st.sampled_from([1, 2, 50]))
    chunk = st.lists(st.integers(0, vocabulary - 1), max_size=length).map(tuple)
    chunks = draw(st.lists(chunk, min_size=count, max_size=count))
    value = draw(st.sampled_from([st.integers(-3, 0).map(float), st.floats(-9, 0, width=32)]))
    if draw(st.booleans()):
        value = st.one_of(value, st.sampled_from([math.nan, -math.inf]))

    def per_token() -> list[list[list[float]]]:
        return [
            [draw(st.lists(value, min_size=len(c), max_size=len(c))) for c in chunks]
            for _ in range(guides)
        ]

    def each(strategy: st.SearchStrategy) -> list:
        return draw(st.lists(strategy, min_size=count, max_size=count))

    return RoundOfOne(
        chunks=chunks,
        siblings=each(st.integers(0, 2)),
        previous=each(st.sampled_from([0.0, 1.0, -2.5])),
        before=each(st.integers(1, 3)),
        parents=each(st.integers(-1, 5)),
        tuned=per_token(),
        untuned=per_token(),
        width=draw(st.integers(1, count + 2)),
        mean=draw(st.booleans()),
        dedup=draw(st.booleans()),
    )


@st.composite
def some_rounds(draw: st.DrawFn, **limits: int) -> tuple[list[RoundOfOne], list[float]]:
    guides = draw(st.integers(1, 2))
    weights = draw(st.lists(st.sampled_from([1.0, 0.5, -2.0]), min_size=guides, max_size=guides))
    return draw(st.lists(one_round(guides, **limits), min_size=1, max_size=4)), weights


def check(rounds: list[RoundOfOne], weights: list[float]) -> None:
    """The operator against the naive selection, request by request."""
    found = run(rounds, weights)
    tokens = candidates = 0
    for i, r in enumerate(rounds):
        expected = naive(r, weights)
        ends = [sum(map(len, r.chunks[:c])) for c in range(len(r.chunks) + 1)]
        here = slice(tokens, tokens + ends[-1])
        same(found.token_scores[here].tolist(), expected.token_scores)
        there = slice(candidates, candidates + len(r.chunks))
        same(found.scores[there].tolist(), expected.scores)
        assert found.broken[there].tolist() == [
            -1 if at is None else tokens + ends[c] + at for c, at in enumerate(expected.broken)
        ]
        kept = expected.kept
        empty = [-1] * (found.kept.shape[1] - len(kept))
        assert found.kept[i].tolist() == kept + empty
        assert found.parents[i].tolist() == [r.parents[c] for c in kept] + empty
        tokens += ends[-1]
        candidates += len(r.chunks)


def same(found: list[float], expected: list[float]) -> None:
    for x, y in zip(found, expected, strict=True):
        assert math.isclose(x, y, rel_tol=1e-12, abs_tol=1e-12) or (
            x == y or (math.isnan(x) and math.isnan(y))
        )
