"""The kernels' Philox gives the same words, and the same numbers, as the torch one."""

from __future__ import annotations

import torch

from tests.interpret.rule import DEVICE
from tests.kernels.test_noise import KNOWN_ANSWERS
from w2s_fast.kernels.library import jit, tl
from w2s_fast.kernels.noise import philox_kernel, seed_bits, uniform, uniform_kernel


@jit
def words(keys, out):
    row = keys + tl.program_id(0) * 6
    x0, x1, x2, x3 = philox_kernel(
        tl.load(row), tl.load(row + 1), tl.load(row + 2),
        tl.load(row + 3), tl.load(row + 4), tl.load(row + 5),
    )  # fmt: skip
    out += tl.program_id(0) * 4
    tl.store(out, x0)
    tl.store(out + 1, x1)
    tl.store(out + 2, x2)
    tl.store(out + 3, x3)


@jit
def numbers(seed, candidate, position, out):
    i = tl.program_id(0)
    tl.store(
        out + i,
        uniform_kernel(tl.load(seed + i), tl.load(candidate + i), tl.load(position + i)),
    )


def test_philox_gives_the_known_answers() -> None:
    keys = torch.tensor([[*counter, *key] for counter, key, _ in KNOWN_ANSWERS], device=DEVICE)
    out = torch.empty(len(keys), 4, dtype=torch.int64, device=DEVICE)
    words[(len(keys),)](keys, out)
    assert out.tolist() == [list(answer) for _, _, answer in KNOWN_ANSWERS]


def test_uniform_numbers_equal_the_torch_ones_bit_for_bit() -> None:
    seeds = [0, 1, 2**31, 2**32 + 5, 2**63 - 1, 2**63, 2**64 - 1]
    seed = torch.tensor([seed_bits(s) for s in seeds] * 10)
    candidate = torch.randint(0, 2**31, (70,))
    position = torch.randint(0, 2**31, (70,))
    candidate[:20] = torch.arange(20)
    position[:10] = 0
    out = torch.empty(70, dtype=torch.float64, device=DEVICE)
    numbers[(70,)](seed.to(DEVICE), candidate.to(DEVICE), position.to(DEVICE), out)
    assert torch.equal(out.cpu(), uniform(seed, candidate, position))
    assert len(out.unique()) == 70
