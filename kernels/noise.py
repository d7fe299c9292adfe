"""The one definition of the noise a search draws: Philox 4x32-10, counted, never stateful.

A token's noise is one uniform number keyed by (request seed, candidate, position), so it does
not depend on batch rows, on the order of requests, or on any global generator. Philox is the
counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).

    key     = (seed mod 2^32, seed >> 32)
    counter = (candidate, position, 0, 0)
    uniform = ((x0 >> 5) * 2^26 + (x1 >> 6)) / 2^53      from output words x0 and x1

``candidate`` is the index among the candidates of its round, ``position`` the index of the
token in the response, both from 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
ROUNDS = 10


def philox_4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words a counter, all held in int64 tensors of one shape."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # The 64-bit product wraps around in int64, which leaves its bits right; the mask
        # after the arithmetic shift drops the copied sign.
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            (p1 >> 32) & _MASK ^ c1 ^ k0,
            p1 & _MASK,
            (p0 >> 32) & _MASK ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


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


def seed_bits(seed: int) -> int:
    """An unsigned 64-bit seed as the int64 with the same bits."""
    return seed - 2**64 if seed >= 2**63 else seed
