"""The candidates of many requests as tensors, and back: what select_beams is given and answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from w2s_fast.kernels.select_beams import select_beams
from w2s_fast.search.beam import Beam
from w2s_fast.search.request import Request


class Broken(NamedTuple):
    """A new token: its index among all, and within its candidate's chunk."""

    token: int
    offset: int


@dataclass(frozen=True)
class Choice:
    """What a selection found, on the host.

    Attributes:
        token_scores: one list a candidate: the scores of its new tokens.
        scores: each candidate's sum over its whole response.
        kept: for each request, indices of the candidates it keeps, best first.
        broken: for each candidate its first new token whose score is not finite; None if all are.
    """

    token_scores: list[list[float]]
    scores: list[float]
    kept: list[list[int]]
    broken: list[Broken | None]


def choose(
    requests: Sequence[Request],
    chunks: Sequence[Sequence[int]],
    tuned: Tensor,
    untuned: Tensor,
    weights: Sequence[float],
) -> Choice:
    """Score and rank all candidates of all requests in one call of the operator.

    Args:
        requests: each with a complete round.
        chunks: new tokens of every candidate, request by request; none for a finished one.
        tuned, untuned: float32 [guides, T], log-probs of those tokens in their order.
        weights: of the guides.
    """
    device = tuned.device

    def column(values: Sequence[float] | Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    def cumulative(counts: Sequence[int]) -> Tensor:
        return column([0, *counts], torch.int64).cumsum(0)

    beams = [beam for request in requests for beam in request.candidates]
    counts = [len(request.candidates) for request in requests]
    params = [request.params for request in requests]
    found = select_beams(
        tuned,
        untuned,
        column(list(weights), torch.float64),
        column([token for chunk in chunks for token in chunk], torch.int64),
        cumulative([len(chunk) for chunk in chunks]),
        column([beam.total for beam in beams], torch.float64),
        column([len(beam.tokens) for beam in beams], torch.int64),
        column([-1 if beam.parent is None else beam.parent for beam in beams], torch.int32),
        column(_siblings(requests), torch.int64),
        cumulative(counts),
        column([p.kept for p in params], torch.int64),
        column([p.score == "mean" for p in params], torch.bool),
        column([p.dedup for p in params], torch.bool),
        max(counts),
        max(p.kept for p in params),
    )
    flat = iter(found.token_scores.tolist())
    starts = accumulate((len(chunk) for chunk in chunks), initial=0)
    return Choice(
        token_scores=[[next(flat) for _ in chunk] for chunk in chunks],
        scores=found.scores.tolist(),
        kept=[[c for c in row if c >= 0] for row in found.kept.tolist()],
        broken=[
            Broken(token, token - start) if token >= 0 else None
            for token, start in zip(found.broken.tolist(), starts)
        ],
    )


def _siblings(requests: Sequence[Request]) -> list[int]:
    """For each candidate, which of its request's parents is the first with its parent's tokens."""
    found = []
    for request in requests:
        first: dict[tuple[int, ...], int] = {}
        for family in request.families:
            kind = first.setdefault(tuple(family.parent.tokens), len(first))
            found += [kind] * len(family.children)
    return found


def new_tokens(beam: Beam) -> list[int]:
    """The tokens of a candidate that no guide has scored yet."""
    return beam.tokens[len(beam.token_scores) :]
