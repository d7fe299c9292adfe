"""The exact search of sample_tokens for rows whose survivors do not fit, and what kernels share.

Nothing is assumed about the row. A threshold is found by passes that sum what lies above each of
several pivots, until what lies between two of them fits into the scratch row of survivors: 4 or 5
passes for top-k or top-p, at most 11 where values tie in thousands. Meant for rows that are rare.
"""

from __future__ import annotations

from w2s_fast.kernels.library import constexpr, jit, tl
from w2s_fast.kernels.noise import uniform_kernel

WEIGHT_ONE = constexpr(1099511627776.0)  # 2^40
WEIGHT_ONE_KEY = constexpr(0x53800000)  # the bits of float32 2^40, see `order_key`


@jit
def row_statistics(block_max, block_sum, row, blocks, BLOCKS: tl.constexpr):
    """max and sum exp(x - max) of a row, and whether it can be sampled from at all."""
    b = tl.arange(0, BLOCKS)
    maxima = tl.load(block_max + row * blocks + b, mask=b < blocks, other=-float("inf"))
    sums = tl.load(block_sum + row * blocks + b, mask=b < blocks, other=0.0)
    largest = tl.max(maxima, 0)
    finite = (largest > -float("inf")) & (largest < float("inf"))
    total = tl.sum(sums * tl.exp(maxima - tl.where(finite, largest, 0.0)), 0)
    return largest, total, finite & (total == total)


@jit
def integer_weight(x, largest, temperature):
    """floor(2^40 * exp((x - largest) / temperature)) as int64, 0 for x = -inf."""
    t = tl.maximum(temperature, 1.1754944e-38)
    # The quotient as IEEE division rounds it, in three operations an element (Markstein): weights
    # then differ from a CPU's by exp's own rounding only. Below -64 the weight is 0 anyway.
    inverse = tl.div_rn(1.0, t)
    difference = x - largest
    quotient = difference * inverse
    remainder = tl.fma(-quotient, t, difference)
    corrected = tl.fma(remainder, inverse, quotient)
    e = tl.exp(tl.where(quotient > -64.0, corrected, -64.0))
    return (tl.where(x > -float("inf"), e, 0.0) * WEIGHT_ONE).to(tl.int64)


@jit
def cut_off(largest, temperature):
    """Logits below this weigh nothing: exp(-28) < 2^-40. Finite."""
    return tl.maximum(largest - 28.0 * temperature, -3.4028234e38)


@jit
def order_key(x):
    """int32 that orders as the float32 does; 0.0 and -0.0 are one key. -inf is the smallest."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def top_p_mass(top_p, total):
    """The integer mass that top-p asks for, from 1 to ``total``."""
    needed = tl.ceil(top_p * total.to(tl.float64)).to(tl.int64)
    return tl.minimum(tl.maximum(needed, 1), total)


@jit
def bisect(key, mass, needed, low, high, slack):
    """The largest threshold t in [low, high) where sum(mass[key >= t]) >= needed, and that sum.

    ``low`` where there is none. It stops early at a sum of at most needed + slack, which at slack
    0 takes nothing away from the kept set. ``high`` must be too high.
    """
    reached = tl.sum(tl.where(key >= low, mass, 0), 0)
    while (high - low > 1) & ((reached < needed) | (reached > needed + slack)):
        middle = (low + high) >> 1
        above = tl.sum(tl.where(key >= middle, mass, 0), 0)
        enough = above >= needed
        reached = tl.where(enough, above, reached)
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low, reached


@jit
def draw_in_order(weight, total, u):
    """Index of the first weight where the running sum exceeds floor(u * total)."""
    target = tl.minimum((u * total.to(tl.float64)).to(tl.int64), total - 1)
    return tl.sum((tl.cumsum(weight, 0) <= target).to(tl.int32), 0)


@jit(
    do_not_specialize=[
        "temperatures", "top_ks", "top_ps", "min_ps", "seeds", "candidates", "positions",
        "block_max", "block_sum", "tokens", "logprobs",
    ]
)  # fmt: skip
def search(
    logits, row_stride, vocab,
    temperatures, top_ks, top_ps, min_ps, seeds, candidates, positions,
    block_max, block_sum, blocks, scratch, tokens, logprobs,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, PIVOTS: tl.constexpr, ROUNDS: tl.constexpr,
    CAPACITY: tl.constexpr,
):  # fmt: skip
    """Replaces the tokens that are -1."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(tokens + row) < 0:
        start = logits + row * row_stride
        temperature = tl.load(temperatures + row)
        top_k = tl.load(top_ks + row)
        top_p = tl.load(top_ps + row)
        largest, normaliser, _usable = row_statistics(block_max, block_sum, row, blocks, BLOCKS)

        scratch += row * CAPACITY
        kth = order_key(cut_off(largest, temperature)).to(tl.int64)
        if (top_k > 0) & (top_k < vocab):
            kth, _reached = _threshold(
                start, vocab, largest, temperature, kth, top_k,
                kth, order_key(largest).to(tl.int64) + 1, scratch,
                False, BLOCK, PIVOTS, ROUNDS, CAPACITY,
            )  # fmt: skip
        level = tl.full((), 1, tl.int64)
        total = _mass(start, vocab, largest, temperature, kth, level, BLOCK)
        if top_p < 1:
            key, total = _threshold(
                start, vocab, largest, temperature, kth, top_p_mass(top_p, total),
                tl.zeros((), tl.int64), tl.full((), WEIGHT_ONE_KEY + 1, tl.int64), scratch,
                True, BLOCK, PIVOTS, ROUNDS, CAPACITY,
            )  # fmt: skip
            level = key.to(tl.int32).to(tl.float32, bitcast=True).to(tl.int64)
        least = tl.ceil(tl.load(min_ps + row) * WEIGHT_ONE).to(tl.int64)
        if least > level:
            level = least
            total = _mass(start, vocab, largest, temperature, kth, level, BLOCK)

        u = uniform_kernel(
            tl.load(seeds + row), tl.load(candidates + row), tl.load(positions + row)
        )
        target = tl.minimum((u * total.to(tl.float64)).to(tl.int64), total - 1)
        before = tl.zeros((), tl.int64)
        token = tl.full((), -1, tl.int64)
        first = tl.zeros((), tl.int32)
        while (token < 0) & (first < vocab):
            weight = _kept(start, vocab, largest, temperature, kth, level, first, BLOCK)
            after = before + tl.sum(weight, 0)
            if after > target:
                below = before + tl.cumsum(weight, 0) <= target
                token = (first + tl.sum(below.to(tl.int32), 0)).to(tl.int64)
            before = after
            first += BLOCK
        x = tl.load(start + token).to(tl.float32)
        tl.store(tokens + row, token)
        tl.store(logprobs + row, x - largest - tl.log(normaliser))


@jit
def _kept(start, vocab, largest, temperature, kth, level, first, BLOCK: tl.constexpr):
    """Weights of a block, 0 where they do not pass both thresholds."""
    _value, weight = _value_and_mass(start, vocab, largest, temperature, kth, first, True, BLOCK)
    return tl.where(weight >= level, weight, 0)


@jit
def _mass(start, vocab, largest, temperature, kth, level, BLOCK: tl.constexpr):
    sums = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, vocab, BLOCK):
        weight = _kept(start, vocab, largest, temperature, kth, level, first, BLOCK)
        sums += weight
    return tl.sum(sums, 0)


@jit
def _threshold(
    start, vocab, largest, temperature, kth, needed, low, high, scratch,
    BY_WEIGHT: tl.constexpr, BLOCK: tl.constexpr, PIVOTS: tl.constexpr, ROUNDS: tl.constexpr,
    CAPACITY: tl.constexpr,
):  # fmt: skip
    """The largest key t in [low, high) that keeps a mass of ``needed``, and the mass it keeps.

    ``low`` if none does. BY_WEIGHT: keys are those of the weights, and so is the mass. Else keys
    are the logits', and a token's mass is 1. A pass divides the interval by PIVOTS.
    """
    i = tl.arange(0, PIVOTS)
    reached = needed + 1  # mass of what is >= low, not known yet
    above = needed * 0  # mass of what is >= high
    rounds = tl.zeros((), tl.int32)
    while (high - low > 1) & (reached > needed):
        pivots = low + (high - low) * i // PIVOTS  # the first is `low` itself
        masses = tl.zeros((BLOCK, PIVOTS), tl.int64)
        for first in range(0, vocab, BLOCK):
            value, mass = _value_and_mass(
                start, vocab, largest, temperature, kth, first, BY_WEIGHT, BLOCK
            )
            masses += tl.where(order_key(value)[:, None] >= pivots[None, :], mass[:, None], 0)
        sums = tl.sum(masses, 0)
        # Sums fall from pivot to pivot. If the first does not reach `needed`, `low` stays.
        enough = tl.maximum(tl.sum((sums >= needed).to(tl.int32), 0), 1)
        reached = tl.sum(tl.where(i == enough - 1, sums, 0), 0)
        above = tl.where(enough < PIVOTS, tl.sum(tl.where(i == enough, sums, 0), 0), above)
        high = tl.min(tl.where(i >= enough, pivots, high), 0)
        low = tl.max(tl.where(i < enough, pivots, low), 0)
        rounds += 1
        if (rounds >= ROUNDS) & (high - low > 1) & (reached > needed):
            n = _gather_between(
                start, vocab, largest, temperature, kth, low, high, scratch,
                BY_WEIGHT, BLOCK, CAPACITY,
            )  # fmt: skip
            if n <= CAPACITY:
                index = tl.arange(0, CAPACITY)
                value = tl.load(scratch + index, mask=index < n, other=0.0)
                mass = value.to(tl.int64) if BY_WEIGHT else tl.full((CAPACITY,), 1, tl.int64)
                mass = tl.where(index < n, mass, 0)
                low, between = bisect(order_key(value), mass, needed - above, low, high, 0)
                reached = above + between
                high = low + 1
            tl.debug_barrier()  # all have read before the next attempt writes
    return low, reached


@jit
def _value_and_mass(
    start, vocab, largest, temperature, kth, first, BY_WEIGHT: tl.constexpr, BLOCK: tl.constexpr
):
    """What a block's tokens are compared by, and what they count for; see `_threshold`."""
    v = first + tl.arange(0, BLOCK)
    x = tl.load(start + v, mask=v < vocab, other=-float("inf")).to(tl.float32)
    if BY_WEIGHT:
        mass = tl.where(order_key(x) >= kth, integer_weight(x, largest, temperature), 0)
        value = mass.to(tl.float32)  # exact: it came from a float32
    else:
        mass = tl.full((BLOCK,), 1, tl.int64)
        value = x
    return value, mass


@jit
def _gather_between(
    start, vocab, largest, temperature, kth, low, high, scratch,
    BY_WEIGHT: tl.constexpr, BLOCK: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """Writes the values with keys in [low, high); returns how many, or more than CAPACITY."""
    n = tl.zeros((), tl.int32)
    first = tl.zeros((), tl.int32)
    while (first < vocab) & (n <= CAPACITY):
        value, _mass_of_block = _value_and_mass(
            start, vocab, largest, temperature, kth, first, BY_WEIGHT, BLOCK
        )
        key = order_key(value)
        inside = (key >= low) & (key < high)
        index = n + tl.cumsum(inside.to(tl.int32), 0) - 1
        tl.store(scratch + index, value, mask=inside & (index < CAPACITY))
        n += tl.sum(inside.to(tl.int32), 0)
        first += BLOCK
    tl.debug_barrier()
    return n
