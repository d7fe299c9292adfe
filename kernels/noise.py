"""The one definition of the noise a search draws: Philox 4x32-10, counted, never stateful.

A token's noise is one uniform number keyed by (seed, candidate, position), so it does
not depend on batch rows, on their order, or on any global generator. Philox is the
counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).

    key     = (seed mod 2^32, seed >> 32)
    counter = (candidate, position, 0, 0)
    uniform = ((x0 >> 5) * 2^26 + (x1 >> 6)) / 2^53      from output words x0 and x1

``candidate`` is the index among the candidates of its round, ``position`` the index of the
token in the response, both from 0.

What resamples a round draws one more, with its number, from 1, in the place of ``candidate`` and
counter (round, 0, 1, 0): no token's third word is 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, from_numpy

from w2s_fast.kernels.library import jit, tl

_MASK = 0xFFFFFFFF


def philox_rounds(c0, c1, c2, c3, k0, k1):
    """The ten rounds, on 32-bit words held in int64: arrays, or scalars of a kernel.

    All run this one body (:func:`philox_kernel` is its Triton form), which is why the constants
    are spelled out: a kernel sees no globals.
    """
    for _ in range(10):
        # The 64-bit product wraps around in int64, which leaves its bits right; the mask
        # after the arithmetic shift drops the copied sign.
        p0 = c0 * 0xD2511F53
        p1 = c2 * 0xCD9E8D57
        c0 = ((p1 >> 32) & 0xFFFFFFFF) ^ c1 ^ k0
        c2 = ((p0 >> 32) & 0xFFFFFFFF) ^ c3 ^ k1
        c1 = p1 & 0xFFFFFFFF
        c3 = p0 & 0xFFFFFFFF
        k0 = (k0 + 0x9E3779B9) & 0xFFFFFFFF
        k1 = (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


philox_kernel = jit(philox_rounds)


def philox_4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words a counter, all held in int64 tensors of one shape [S]."""
    words: tuple[Tensor, Tensor, Tensor, Tensor]
    if counter[0].is_cpu:
        # 160 operations on a few numbers each: numpy takes a third of the time that torch takes.
        c0, c1, c2, c3 = philox_rounds(*(word.numpy() for word in (*counter, *key)))
        words = (from_numpy(c0), from_numpy(c1), from_numpy(c2), from_numpy(c3))
    else:
        words = philox_rounds(*counter, *key)
    return words


def uniform(seed: Tensor, candidate: Tensor, position: Tensor) -> Tensor:
    """Uniform float64 numbers in [0, 1), one for each (seed, candidate, position).

    Args:
        seed: int64 [S], the bits of an unsigned 64-bit seed (see :func:`seed_bits`).
        candidate: int64 [S], >= 0.
        position: int64 [S], >= 0.
    """
    zero = torch.zeros_like(position)
    key = (seed & _MASK, (seed >> 32) & _MASK)
    x0, x1, _, _ = philox_4x32((candidate & _MASK, position & _MASK, zero, zero), key)
    return ((x0 >> 5) * 2**26 + (x1 >> 6)).double() * 2.0**-53


def uniform_of_round(seed: int, number: int) -> float:
    """The number in [0, 1) that resamples a round; ``seed``: as :func:`seed_bits` gives it."""
    words = (seed & _MASK, seed >> 32 & _MASK, number & _MASK, 0, 1)
    low, high, counter, zero, one = (torch.tensor([word]) for word in words)
    x0, x1, _, _ = philox_4x32((counter, zero, one, zero), (low, high))
    return float(((x0 >> 5) * 2**26 + (x1 >> 6)).double() * 2.0**-53)


@jit
def uniform_kernel(seed, candidate, position):
    """:func:`uniform` inside of a kernel: int64 scalars to a float64 scalar, bit for bit."""
    zero = position * 0
    mask = 0xFFFFFFFF
    x0, x1, _, _ = philox_kernel(
        candidate & mask, position & mask, zero, zero, seed & mask, (seed >> 32) & mask
    )
    return ((x0 >> 5) * 67108864 + (x1 >> 6)).to(tl.float64) * 1.1102230246251565e-16


def seed_bits(seed: int) -> int:
    """An unsigned 64-bit seed as the int64 with the same bits."""
    return seed - 2**64 if seed >= 2**63 else seed
