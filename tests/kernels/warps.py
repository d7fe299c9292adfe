"""Rows to sample from under given settings, and the distribution that they define."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

from w2s_fast.kernels.noise import seed_bits
from w2s_fast.kernels.sample_tokens import sample_tokens

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


def columns(warps: Sequence[Warp]) -> tuple[torch.Tensor, ...]:
    """The settings of the rows as sample_tokens takes them: four tensors [S]."""
    return (
        torch.tensor([w.temperature for w in warps], dtype=torch.float32),
        torch.tensor([w.top_k for w in warps]),
        torch.tensor([w.top_p for w in warps], dtype=torch.float64),
        torch.tensor([w.min_p for w in warps], dtype=torch.float64),
    )


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
        *columns(warps),
        torch.tensor([seed_bits(s) for s in seeds]),
        torch.tensor(candidate or [0] * rows),
        torch.tensor(position or list(range(rows))),
    )


def random_logits(vocabulary: int, seed: int, scale: float = 1.5) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(vocabulary) * scale).astype(np.float32)


def rows_of(count: int, vocabulary: int, scale: float = 1.5) -> torch.Tensor:
    """Random logits [count, vocabulary], each row its own."""
    return torch.from_numpy(np.stack([random_logits(vocabulary, i, scale) for i in range(count)]))


def any_row(most: int) -> st.SearchStrategy[list[float]]:
    """Up to so many logits, with ties and forbidden tokens among them, but one allowed at least."""
    logit = st.one_of(st.integers(-4, 4).map(float), st.floats(-20, 20, width=32), st.just(-INF))
    return st.lists(logit, min_size=1, max_size=most).filter(lambda row: max(row) > -INF)


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


TIED = np.array([0.5, 2.0, 1.0, -1.0, 1.0, 3.0, 1.0, 0.0], dtype=np.float32)
any_warp = st.builds(
    Warp,
    st.sampled_from([0.0, 0.05, 0.5, 1.0, 2.5]),
    st.integers(0, 40),
    st.sampled_from([1.0, 1.0, 0.99, 0.9, 0.5, 0.25, 0.01]),
    st.sampled_from([0.0, 0.0, 0.01, 0.1, 0.5, 1.0]),
)
