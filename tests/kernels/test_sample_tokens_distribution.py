"""sample_tokens draws from exactly the warped distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.kernels.warps import INF, TIED, Warp, chi_square_p, draw, random_logits, warped
from w2s_fast.kernels import sample_tokens as module
from w2s_fast.kernels.sample_tokens import sample_tokens

DRAWS = 200_000


def counts(logits: np.ndarray, warp: Warp, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """How often each token comes in that many draws from one row of logits."""
    row = torch.from_numpy(logits)
    block = max(1, 4_000_000 // len(logits))
    total = np.zeros(len(logits), dtype=np.int64)
    for start in range(0, draws, block):
        n = min(block, draws - start)
        tokens, _ = sample_tokens(
            row.expand(n, -1),
            torch.full((n,), warp.temperature),
            torch.full((n,), warp.top_k),
            torch.full((n,), warp.top_p, dtype=torch.float64),
            torch.full((n,), warp.min_p, dtype=torch.float64),
            torch.full((n,), seed),
            torch.zeros(n, dtype=torch.int64),
            torch.arange(start, start + n),
        )
        total += np.bincount(tokens.numpy(), minlength=len(logits))
    return total


WITH_FORBIDDEN = np.array([-INF, 2.0, 1.0, -INF, 0.5, 0.0, -INF], dtype=np.float32)

# What is sampled from, and how many tokens are allowed.
DISTRIBUTIONS = {
    "plain": (random_logits(17, 0), Warp(), 17),
    "cold": (random_logits(17, 1), Warp(temperature=0.7), 17),
    "hot": (random_logits(17, 2), Warp(temperature=3.0), 17),
    "top_k": (random_logits(17, 3), Warp(top_k=4), 4),
    "top_k above the vocabulary": (random_logits(17, 3), Warp(top_k=1000), 17),
    "top_k at a tie keeps all of the tie": (TIED, Warp(top_k=3), 5),
    "top_k at the end of a tie": (TIED, Warp(top_k=5), 5),
    "top_p": (np.log(np.array([4, 1, 3, 2], dtype=np.float32)), Warp(top_p=0.65), 2),
    "top_p at a tie keeps all of the tie": (TIED, Warp(top_p=0.8), 5),
    "top_p tiny": (random_logits(17, 5), Warp(top_p=1e-9), 1),
    "top_p almost 1": (random_logits(17, 5), Warp(top_p=1 - 1e-9), 17),
    "min_p": (np.log(np.array([4, 1, 3, 2], dtype=np.float32)), Warp(min_p=0.4), 3),
    "min_p 1 keeps the likeliest": (TIED, Warp(min_p=1.0), 1),
    "forbidden": (WITH_FORBIDDEN, Warp(), 4),
    "forbidden, top_k above the rest": (WITH_FORBIDDEN, Warp(top_k=6), 4),
    "forbidden, top_p": (WITH_FORBIDDEN, Warp(top_p=0.9), 3),
    "temperature before top_p": (
        np.log(np.array([4, 1, 3, 2], dtype=np.float32)),
        Warp(temperature=0.2, top_p=0.65),
        1,
    ),
    "top_k before top_p": (
        np.log(np.array([40, 10, 30, 20], dtype=np.float32)),
        Warp(top_k=2, top_p=0.56),
        1,
    ),
    "all together": (
        random_logits(60, 6),
        Warp(temperature=1.3, top_k=30, top_p=0.9, min_p=0.06),
        0,
    ),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_tokens_follow_the_warped_distribution(name: str) -> None:
    logits, warp, allowed = DISTRIBUTIONS[name]
    p = warped(logits, warp)
    assert not allowed or (p > 0).sum() == allowed  # the test's own warper does what the name says
    observed = counts(logits, warp)
    assert observed[p == 0].sum() == 0
    assert (observed[p * DRAWS > 30] > 0).all()
    assert chi_square_p(observed, p) > 1e-4


def test_a_wrong_distribution_would_be_seen() -> None:
    logits = random_logits(17, 0)
    observed = counts(logits, Warp())
    assert chi_square_p(observed, warped(logits, Warp(temperature=1.03))) < 1e-4
    assert chi_square_p(observed, warped(logits + 0.1 * (np.arange(17) == 3), Warp())) < 1e-4


@pytest.mark.parametrize(
    "warp",
    [
        Warp(),
        pytest.param(Warp(top_p=0.9), marks=pytest.mark.thorough),
        Warp(temperature=0.7, top_k=500, top_p=0.95, min_p=0.001),
    ],
    ids=str,
)
def test_a_heavy_tail_over_a_large_vocabulary_is_sampled_in_proportion(warp: Warp) -> None:
    rank = np.random.default_rng(0).permutation(5_000) + 1
    logits = (-1.1 * np.log(rank)).astype(np.float32)  # Zipf
    observed = counts(logits, warp, draws=10_000)
    p = warped(logits, warp)
    assert observed[p == 0].sum() == 0
    assert chi_square_p(observed, p) > 1e-4
    decades = np.digitize(rank, [1, 10, 100, 1000])  # the rare tokens, by their ranks
    by_decade = [np.bincount(decades, weights=x, minlength=5)[1:] for x in (observed, p)]
    assert chi_square_p(*by_decade) > 1e-4


def test_top_p_keeps_one_token_more_only_just_above_its_exact_edge() -> None:
    logits = torch.log(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]))
    weights = ((logits - logits.max()).exp() * 2.0**40).long().tolist()
    total = sum(weights)
    for kept in (1, 2, 3, 4):
        mass = sum(weights[:kept])
        edge = mass / total
        while edge * total > mass:  # the division may have rounded up
            edge = math.nextafter(edge, 0)
        for top_p, allowed in ((edge, kept), (edge * (1 - 1e-9), kept), (edge + 1e-9, kept + 1)):
            tokens, _ = draw(logits.expand(4000, -1), Warp(top_p=top_p))
            assert set(tokens.tolist()) == set(range(allowed)), (kept, top_p)


def test_a_draw_at_the_very_edge_of_a_token_takes_the_right_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Four equal tokens among forbidden ones: token t owns [t / 4, (t + 1) / 4).
    logits = torch.tensor([-INF, 2.0, -INF, 2.0, 2.0, -INF, 2.0, -INF])
    below = 2.0**-53
    expected = {
        0.0: 1,
        below: 1,
        0.25 - below: 1,
        0.25: 3,
        0.5 - below: 3,
        0.5: 4,
        0.75 - below: 4,
        0.75: 6,
        1 - below: 6,
    }
    draws = torch.tensor(list(expected), dtype=torch.float64)
    monkeypatch.setattr(module, "uniform", lambda *_: draws)
    tokens, _ = draw(logits.expand(len(draws), -1), Warp())
    assert tokens.tolist() == list(expected.values())


WARPERS = {
    "temperature, top_k": (
        Warp(temperature=0.7, top_k=6),
        lambda: [TemperatureLogitsWarper(0.7), TopKLogitsWarper(6)],
    ),
    "top_p": (Warp(top_p=0.8), lambda: [TopPLogitsWarper(0.8)]),
    "min_p": (Warp(min_p=0.15), lambda: [MinPLogitsWarper(0.15)]),
    "all": (
        Warp(temperature=1.4, top_k=11, top_p=0.85, min_p=0.12),
        lambda: [
            TemperatureLogitsWarper(1.4),
            TopKLogitsWarper(11),
            TopPLogitsWarper(0.85),
            MinPLogitsWarper(0.12),
        ],
    ),
}


@pytest.mark.parametrize("name", WARPERS)
def test_the_allowed_tokens_are_those_of_transformers_warpers(name: str) -> None:
    warp, warpers = WARPERS[name]
    for seed in range(12):
        logits = torch.from_numpy(random_logits(20, 100 + seed, 1.0))
        scores = logits[None]
        for warper in warpers():
            scores = warper(torch.zeros(1, 1, dtype=torch.int64), scores)
        theirs = set(scores[0].isfinite().nonzero()[:, 0].tolist())
        # The least likely allowed token has more than 1/1000: it comes within 20,000 draws.
        tokens, _ = draw(logits.expand(20_000, -1), warp, seed=seed)
        assert set(tokens.tolist()) == theirs, seed
