"""sample_tokens draws from exactly the warped distribution, whatever stands in other rows."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.reference import sample_token
from w2s_fast.kernels import sample_tokens as module
from w2s_fast.kernels import sample_tokens as sample_module
from w2s_fast.kernels.noise import seed_bits, uniform
from w2s_fast.kernels.sample_tokens import sample_tokens

DRAWS = 200_000
INF = math.inf


@dataclass(frozen=True)
class Warp:
    """One row's settings; the defaults change nothing."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def warped(logits: np.ndarray, warp: Warp) -> np.ndarray:
    """The distribution sampled from, in float64, straight from its definition. [V] to [V]."""
    scaled = logits.astype(np.float64) / warp.temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    if warp.top_k:
        kth = np.sort(p)[::-1][min(warp.top_k, len(p)) - 1]
        p = np.where(p >= kth, p, 0.0)
        p /= p.sum()
    if warp.top_p < 1:
        values = np.unique(p)[::-1]  # each level keeps its ties together
        level = next(v for v in values if p[p >= v].sum() >= warp.top_p * (1 - 1e-12))
        p = np.where(p >= level, p, 0.0)
        p /= p.sum()
    p = np.where(p >= warp.min_p * p.max(), p, 0.0)
    return p / p.sum()


def draw(
    logits: torch.Tensor,
    warps: Warp | list[Warp],
    *,
    seed: int | list[int] = 0,
    candidate: list[int] | None = None,
    position: list[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """sample_tokens on [S, V] logits; by default row i draws the noise of position i."""
    rows = len(logits)
    warps = warps if isinstance(warps, list) else [warps] * rows
    seeds = seed if isinstance(seed, list) else [seed] * rows
    return sample_tokens(
        logits,
        torch.tensor([w.temperature for w in warps], dtype=torch.float32),
        torch.tensor([w.top_k for w in warps]),
        torch.tensor([w.top_p for w in warps], dtype=torch.float64),
        torch.tensor([w.min_p for w in warps], dtype=torch.float64),
        torch.tensor([seed_bits(s) for s in seeds]),
        torch.tensor(candidate or [0] * rows),
        torch.tensor(position or list(range(rows))),
    )


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


def chi_square_p(observed: np.ndarray, p: np.ndarray) -> float:
    """p-value of the observed counts; tokens expected fewer than 10 times share one bin."""
    expected = p * observed.sum()
    rare = expected < 10
    o = np.append(observed[~rare], observed[rare].sum())
    e = np.append(expected[~rare], expected[rare].sum())
    o, e = o[e > 0], e[e > 0]
    statistic = ((o - e) ** 2 / e).sum()
    freedom = max(1, len(e) - 1)
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def random_logits(vocabulary: int, seed: int, scale: float = 1.5) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(vocabulary) * scale).astype(np.float32)


TIED = np.array([0.5, 2.0, 1.0, -1.0, 1.0, 3.0, 1.0, 0.0], dtype=np.float32)
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
    [Warp(), Warp(top_p=0.9), Warp(temperature=0.7, top_k=500, top_p=0.95, min_p=0.001)],
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


def test_settings_of_one_row_do_not_reach_another() -> None:
    warps = [
        Warp(),
        Warp(temperature=0.0),
        Warp(top_k=3),
        Warp(top_p=0.5),
        Warp(min_p=0.2),
        Warp(temperature=0.7, top_k=12, top_p=0.9, min_p=0.01),
        Warp(top_k=1),
        Warp(temperature=2.0, top_k=40),
    ] * 50
    logits = torch.from_numpy(np.stack([random_logits(40, i) for i in range(len(warps))]))
    logits[::7, ::3] = -INF
    together, together_lp = draw(logits, warps, seed=3)
    for i, warp in enumerate(warps):
        token, lp = draw(logits[i : i + 1], warp, seed=3, position=[i])
        assert token.item() == together[i].item(), warp
        assert lp.item() == pytest.approx(together_lp[i].item(), abs=1e-6)
        assert warped(logits[i].numpy(), replace(warp, temperature=warp.temperature or 1.0))[
            token
        ] or (warp.temperature == 0)


def test_the_same_key_gives_the_same_token_in_every_row_and_batch() -> None:
    for vocabulary in (1, 7, 64, 1001):
        logits = torch.from_numpy(random_logits(vocabulary, vocabulary, 0.3))
        keys = [(seed, c, t) for seed in (0, 2**64 - 1) for c in (0, 3) for t in (0, 9)]

        def tokens(keys: list[tuple[int, int, int]], row: torch.Tensor = logits) -> list[int]:
            return draw(
                row.expand(len(keys), -1).contiguous(),
                Warp(temperature=0.9, top_k=500),
                seed=[k[0] for k in keys],
                candidate=[k[1] for k in keys],
                position=[k[2] for k in keys],
            )[0].tolist()

        alone = [tokens([key])[0] for key in keys]
        assert tokens(keys) == alone
        assert tokens(keys[::-1]) == alone[::-1]
        assert tokens(keys * 5) == alone * 5
        assert vocabulary < 64 or len(set(alone)) > 1  # different keys, different noise


def test_the_weights_of_a_row_are_the_same_bits_wherever_the_row_stands() -> None:
    # Else a token could depend on the batch. Vectorised exp must not differ at a block's end.
    from w2s_fast.kernels.sample_tokens import _weights

    for vocabulary in (5, 17, 1003):
        row = torch.from_numpy(random_logits(vocabulary, 1, 4.0))
        stack = row.expand(997, -1).contiguous()
        weights = _weights(stack, stack.max(-1).values, torch.full((997,), 0.7))
        alone = _weights(row[None], row.max()[None], torch.tensor([0.7]))
        assert torch.equal(weights, alone.expand(997, -1))


@pytest.mark.parametrize("others", [Warp(), Warp(top_k=5, top_p=0.5, min_p=0.3)], ids=str)
def test_temperature_0_takes_the_likeliest_token_the_lowest_id_at_a_tie(others: Warp) -> None:
    logits = torch.from_numpy(np.stack([random_logits(33, i) for i in range(64)]))
    logits[0] = torch.tensor([1.0, 5.0, 5.0] + [0.0] * 30)
    logits[1] = 0.0
    logits[2] = -INF
    logits[2, 11] = -50.0
    greedy = replace(others, temperature=0.0)
    for seed in (0, 1):
        tokens, logprobs = draw(logits, greedy, seed=seed)
        assert tokens.tolist() == logits.numpy().argmax(-1).tolist()
        assert tokens[:3].tolist() == [1, 0, 11]
        expected = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        torch.testing.assert_close(logprobs, expected)


def test_logprobs_are_those_of_temperature_1_before_any_warping() -> None:
    logits = torch.from_numpy(np.stack([random_logits(50, i, 4.0) for i in range(200)]))
    for warp in (Warp(), Warp(temperature=0.3, top_k=3, top_p=0.5, min_p=0.1), Warp(5.0)):
        tokens, logprobs = draw(logits, warp)
        assert logprobs.dtype == torch.float32
        expected = logits.double().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        torch.testing.assert_close(logprobs.double(), expected, atol=2e-6, rtol=1e-6)


def test_forbidden_tokens_are_never_sampled() -> None:
    logits = torch.from_numpy(np.stack([random_logits(30, i) for i in range(3000)]))
    forbidden = torch.rand(3000, 30) < 0.8
    forbidden[:, 13] = False
    logits[forbidden] = -INF
    for warp in (Warp(), Warp(temperature=50.0), Warp(top_k=29), Warp(top_p=0.999), Warp(0.0)):
        tokens, logprobs = draw(logits, warp)
        assert not forbidden[torch.arange(3000), tokens].any()
        assert logprobs.isfinite().all()


def test_broken_rows_are_flagged_by_nan_and_leave_their_neighbours_alone() -> None:
    clean = torch.from_numpy(np.stack([random_logits(12, i) for i in range(9)]))
    broken = clean.clone()
    broken[1, 4] = math.nan
    broken[3, 0] = INF
    broken[5] = -INF
    broken[7, :3] = torch.tensor([math.nan, INF, -INF])
    for warp in (Warp(), Warp(top_k=3, top_p=0.9, min_p=0.05), Warp(temperature=0.0)):
        tokens, logprobs = draw(broken, warp)
        expected, expected_lp = draw(clean, warp)
        assert logprobs.isnan().tolist() == [i in (1, 3, 5, 7) for i in range(9)]
        assert tokens[1::2].tolist() == [0] * 4
        assert tokens[::2].tolist() == expected[::2].tolist()
        torch.testing.assert_close(logprobs[::2], expected_lp[::2])


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e6, 1e30, 3e38])
def test_extreme_temperatures_stay_in_bounds(temperature: float) -> None:
    logits = torch.from_numpy(np.stack([random_logits(12, i) for i in range(500)]))
    logits[:, ::4] = -INF
    tokens, logprobs = draw(logits, Warp(temperature=temperature))
    assert logprobs.isfinite().all()
    if temperature < 1:
        assert tokens.tolist() == logits.numpy().argmax(-1).tolist()
    else:
        assert set(tokens.tolist()) == {i for i in range(12) if i % 4}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_logits_of_any_float_type_are_sampled_as_float32(dtype: torch.dtype) -> None:
    logits = torch.from_numpy(np.stack([random_logits(100, i) for i in range(300)])).to(dtype)
    warp = Warp(temperature=0.8, top_k=20, top_p=0.9)
    tokens, logprobs = draw(logits, warp)
    expected, expected_lp = draw(logits.float(), warp)
    assert torch.equal(tokens, expected)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, expected_lp)


def test_the_logits_given_are_not_changed() -> None:
    logits = torch.from_numpy(np.stack([random_logits(20, i) for i in range(4)]))
    before = logits.clone()
    draw(logits, Warp(temperature=0.7, top_k=5, top_p=0.8, min_p=0.1))
    assert torch.equal(logits, before)


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


@settings(max_examples=150)
@given(
    logits=st.lists(
        st.one_of(st.integers(-4, 4).map(float), st.floats(-20, 20, width=32), st.just(-INF)),
        min_size=1,
        max_size=30,
    ).filter(lambda row: max(row) > -INF),
    temperature=st.sampled_from([0.0, 0.05, 0.5, 1.0, 2.5]),
    top_k=st.integers(0, 40),
    top_p=st.sampled_from([1.0, 1.0, 0.99, 0.9, 0.5, 0.25, 0.01]),
    min_p=st.sampled_from([0.0, 0.0, 0.01, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 2**64 - 1),
)
def test_every_token_is_that_of_the_plain_reference(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    warp = Warp(temperature, top_k, top_p, min_p)
    row = torch.tensor(logits, dtype=torch.float32)
    tokens, _ = draw(row.expand(40, -1), warp, seed=seed, candidate=[2] * 40)
    expected = [
        sample_token(
            row.numpy(),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            candidate=2,
            position=i,
        )
        for i in range(40)
    ]
    assert tokens.tolist() == expected


def from_the_definition(logits: torch.Tensor, warps: list[Warp], seed: int) -> list[int]:
    """The whole-row path, which looks at every token."""
    rows = torch.arange(len(logits))
    u = uniform(torch.full_like(rows, seed), torch.zeros_like(rows), rows)
    columns = (
        torch.tensor([w.temperature for w in warps], dtype=torch.float32),
        torch.tensor([w.top_k for w in warps]),
        torch.tensor([w.top_p for w in warps], dtype=torch.float64),
        torch.tensor([w.min_p for w in warps], dtype=torch.float64),
    )
    return sample_module._draw(logits, logits.max(-1).values, *columns, u).tolist()


@pytest.mark.parametrize("kind", ["peaked", "flat", "tied", "mostly forbidden"])
def test_looking_at_the_largest_logits_alone_changes_no_token(kind: str) -> None:
    warps = [
        Warp(temperature, top_k, top_p, min_p)
        for temperature in (0.7, 3.0)
        for top_k in (0, 1, 7, 50, 500)
        for top_p in (1.0, 0.9, 0.2)
        for min_p in (0.0, 0.05)
    ]
    logits = torch.from_numpy(np.stack([random_logits(9000, i) for i in range(len(warps))]))
    if kind == "peaked":
        logits = logits * 4
    elif kind == "flat":
        logits = logits * 0.01
    elif kind == "tied":
        logits = logits.round()
    else:
        logits[torch.rand(logits.shape) < 0.999] = -INF
    for rows in (slice(None), slice(0, None, 3), slice(3, 4)):
        tokens, _ = draw(logits[rows], warps[rows], seed=2)
        assert tokens.tolist() == from_the_definition(logits[rows], warps[rows], seed=2)


def test_most_rows_with_filters_need_their_largest_logits_only() -> None:
    logits = torch.from_numpy(np.stack([random_logits(9000, i, 4.0) for i in range(4)]))
    with mock.patch.object(sample_module, "_draw", side_effect=AssertionError("the whole row")):
        draw(logits, [Warp(0.0), Warp(top_k=50), Warp(top_p=0.9), Warp(0.7, 50, 0.95, 0.1)])
        with pytest.raises(AssertionError, match="the whole row"):
            draw(logits, Warp())
