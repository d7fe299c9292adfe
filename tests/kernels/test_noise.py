"""The noise is Philox 4x32-10, and a pure function of (seed, candidate, position)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from w2s_fast.kernels.noise import philox_4x32, seed_bits, uniform

Words = tuple[int, ...]

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, output.
KNOWN_ANSWERS: list[tuple[Words, Words, Words]] = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox(counter: Words, key: Words) -> Words:
    """Philox 4x32-10 in Python's unbounded integers, written from the paper."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return tuple(c)


def philox_numpy(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """The same in uint64 arrays, [N, 4] and [N, 2] to [N, 4]."""
    low = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    c = [counter[:, i].astype(np.uint64) for i in range(4)]
    k = [key[:, i].astype(np.uint64) for i in range(2)]
    for _ in range(10):
        p0 = c[0] * np.uint64(0xD2511F53)
        p1 = c[2] * np.uint64(0xCD9E8D57)
        c = [(p1 >> shift) ^ c[1] ^ k[0], p1 & low, (p0 >> shift) ^ c[3] ^ k[1], p0 & low]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return np.stack(c, axis=1)


def columns(words: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(words[:, i].astype(np.int64)) for i in range(words.shape[1])]


def draw(seed: int, candidates: torch.Tensor, positions: torch.Tensor) -> np.ndarray:
    seeds = torch.full_like(positions, seed_bits(seed))
    return uniform(seeds, candidates, positions).numpy()


def kolmogorov_smirnov_p(sample: np.ndarray) -> float:
    """Asymptotic p-value of the hypothesis that the sample is uniform on [0, 1)."""
    n = len(sample)
    ordered = np.sort(sample)
    above = np.arange(1, n + 1) / n - ordered
    below = ordered - np.arange(n) / n
    x = (math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n)) * max(above.max(), below.max())
    return 2 * sum((-1) ** (j - 1) * math.exp(-2 * j * j * x * x) for j in range(1, 101))


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter: Words, key: Words, expected: Words) -> None:
    words = philox_4x32(
        tuple(torch.tensor([c]) for c in counter),  # type: ignore[arg-type]
        tuple(torch.tensor([k]) for k in key),  # type: ignore[arg-type]
    )
    assert tuple(int(w) for w in words) == expected
    assert philox(counter, key) == expected  # and so does the reference of the tests below


def test_philox_equals_a_numpy_version_over_random_inputs() -> None:
    rng = np.random.default_rng(0)
    counter = rng.integers(0, 2**32, (20_000, 4), dtype=np.uint64)
    key = rng.integers(0, 2**32, (20_000, 2), dtype=np.uint64)
    ours = philox_4x32(tuple(columns(counter)), tuple(columns(key)))  # type: ignore[arg-type]
    assert np.array_equal(torch.stack(ours, 1).numpy(), philox_numpy(counter, key).astype(np.int64))


@given(
    seed=st.integers(0, 2**64 - 1),
    candidate=st.integers(0, 2**31 - 1),
    position=st.integers(0, 2**31 - 1),
)
def test_uniform_is_53_bits_of_the_first_two_words(
    seed: int, candidate: int, position: int
) -> None:
    x0, x1, _, _ = philox((candidate, position, 0, 0), (seed % 2**32, seed >> 32))
    expected = ((x0 >> 5) * 2**26 + (x1 >> 6)) / 2**53
    got = uniform(*(torch.tensor([i]) for i in (seed_bits(seed), candidate, position)))
    assert got.dtype == torch.float64
    assert got.item() == expected


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_seed_keeps_all_of_its_64_bits(seed: int) -> None:
    bits = seed_bits(seed)
    assert -(2**63) <= bits < 2**63
    assert bits % 2**64 == seed
    x0, x1, _, _ = philox((3, 5, 0, 0), (seed % 2**32, seed >> 32))
    value = draw(seed, torch.tensor([3]), torch.tensor([5]))
    assert value.item() == ((x0 >> 5) * 2**26 + (x1 >> 6)) / 2**53


def test_uniform_lies_in_the_half_open_unit_interval_and_is_uniform() -> None:
    position = torch.arange(200_000)
    for seed in (0, 2**63 + 12345):
        u = draw(seed, torch.zeros_like(position), position)
        assert u.min() >= 0
        assert u.max() < 1
        assert kolmogorov_smirnov_p(u) > 1e-4


def test_children_positions_and_seeds_draw_independent_noise() -> None:
    index = torch.arange(100_000)
    first = draw(7, torch.zeros_like(index), index)
    others = {
        "the next candidate": draw(7, torch.ones_like(index), index),
        "the next position": draw(7, torch.zeros_like(index), index + 1),
        "candidate and position swapped": draw(7, index, torch.zeros_like(index)),
        "the next seed": draw(8, torch.zeros_like(index), index),
        "a seed that differs in its upper half": draw(7 + 2**32, torch.zeros_like(index), index),
        "a seed that differs in its top bit": draw(7 + 2**63, torch.zeros_like(index), index),
    }
    for name, other in others.items():
        # 8 x 8 cells of pairs are equally full.
        counts = np.histogram2d(first, other, bins=8, range=((0, 1), (0, 1)))[0]
        expected = len(first) / 64
        statistic = ((counts - expected) ** 2 / expected).sum()
        assert statistic < 126.0, name  # chi-square, 63 degrees of freedom: p = 3e-6
        assert abs(np.corrcoef(first, other)[0, 1]) < 4.5 / math.sqrt(len(first)), name


def test_no_two_keys_of_a_search_share_their_noise() -> None:
    candidates, positions = torch.meshgrid(torch.arange(64), torch.arange(512), indexing="ij")
    u = np.concatenate([draw(s, candidates.flatten(), positions.flatten()) for s in range(4)])
    # 2^17 draws of 53 bits: a collision by chance has probability 1e-6.
    assert len(np.unique(u)) == len(u)


def test_noise_does_not_depend_on_the_row_or_on_the_global_generator() -> None:
    candidates, positions = torch.arange(100) % 7, torch.arange(100)
    torch.manual_seed(1)
    together = draw(5, candidates, positions)
    torch.manual_seed(2)
    order = torch.randperm(100)
    assert np.array_equal(draw(5, candidates[order], positions[order]), together[order.numpy()])
    alone = [draw(5, candidates[i : i + 1], positions[i : i + 1]).item() for i in range(100)]
    assert np.array_equal(alone, together)
