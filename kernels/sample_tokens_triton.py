"""sample_tokens on a GPU: one pass over the logits, then as little more as a row's settings need.

    summarise      all rows      one pass: maxima of small groups of tokens, log-sum-exp of blocks
    block_weights  most rows     a second pass, from the L2 cache where it fits: integer sums of
                                 blocks. Rows with top-k do without, greedy rows, too, and blocks
                                 of negligible tokens are not read.
    draw           a program     greedy: the first group that holds the maximum.
                   a row         No filter, or min-p: the block where the CDF is, once more.
                                 Top-k, top-p: the few groups whose maxima reach a bound hold every
                                 token that can be kept. These survivors go into a scratch row, in
                                 token-id order, and everything else is decided among them.
    search         what is left  too many survivors (ties, a flat distribution): exact all the
                                 same, by counting passes over the row with several pivots each.

The k-th largest of the groups' maxima is never above the k-th largest logit, which makes it a
bound: at top-k 50 of 128,256 tokens in random order, 52 to 69 survive it. Thresholds come from
bisection in the order of the floats' bits, on integer masses, so every path ends at the same
token. No launch depends on the values, nothing waits for the host, and no result depends on the
order programs run in. Selecting through group maxima is in the spirit of Qrita's truncation,
multi-pivot counting is FlashInfer's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from w2s_fast.kernels.library import jit, tl, triton
from w2s_fast.kernels.noise import uniform_kernel
from w2s_fast.kernels.sample_tokens_search import (
    WEIGHT_ONE,
    WEIGHT_ONE_KEY,
    bisect,
    cut_off,
    draw_in_order,
    integer_weight,
    order_key,
    row_statistics,
    search,
    top_p_mass,
)


@dataclass(frozen=True)
class Tiling:
    """Tokens a program and a group hold; every number is a power of two."""

    block: int = 4096
    group: int = 128
    capacity: int = 2048  # survivors of a row; at V = 128,256 in random order top-k 650 fits
    listed: int = 16  # groups of survivors read at a time: more would take over 128 registers
    guess: int = 256  # groups to look in for the nucleus of top-p without top-k
    search_block: int = 1024
    pivots: int = 8
    rounds: int = 3  # counting passes of a search before it tries to gather what is left
    warps: int = 4  # of the pass over all tokens


def tiling_for(vocab_size: int) -> Tiling:
    """Groups so small that there are several hundred, blocks so large that there are few."""
    if vocab_size > 131_072:
        return Tiling(group=256, listed=8)
    if vocab_size > 65_536:
        return Tiling()
    if vocab_size > 16_384:
        return Tiling(block=2048, group=64, warps=8, listed=32, guess=192)
    return Tiling(block=2048, group=32, listed=32, guess=128)


def launch(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    candidate: Tensor,
    position: Tensor,
    tiling: Tiling | None = None,
) -> tuple[Tensor, Tensor]:
    """As :func:`w2s_fast.kernels.sample_tokens.sample_tokens`. ``tiling``: None fits it to V."""
    rows, vocab = logits.shape
    t = tiling or tiling_for(vocab)
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    blocks = triton.cdiv(vocab, t.block)
    groups = blocks * (t.block // t.group)

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    tokens, logprobs = empty(rows, dtype=torch.int64), empty(rows, dtype=torch.float32)
    if rows == 0:
        return tokens, logprobs
    block_max = empty(rows, blocks, dtype=torch.float32)
    block_sum = empty(rows, blocks, dtype=torch.float32)
    group_max = empty(rows, groups, dtype=torch.float32)
    block_weight = empty(rows, blocks, dtype=torch.int64)
    listed = empty(rows, groups, dtype=torch.int32)
    values = empty(rows, t.capacity, dtype=torch.float32)
    ids = empty(rows, t.capacity, dtype=torch.int32)
    row = (logits, logits.stride(0), vocab)
    settings = (temperature, top_k, top_p, min_p, seed, candidate, position)
    statistics = (block_max, block_sum, blocks)
    sizes: dict[str, Any] = {"BLOCK": t.block, "BLOCKS": triton.next_power_of_2(blocks)}

    # Registers are bounded: the compiler's own bounds are at times so low that it spills.
    summarise[(rows * blocks,)](
        *row, *statistics, group_max, GROUP=t.group, BLOCK=t.block, num_warps=t.warps,
        enable_fp_fusion=True,
    )  # fmt: skip
    block_weights[(rows * blocks,)](
        *row, *settings[:4], *statistics, block_weight, **sizes, maxnreg=88, enable_fp_fusion=True
    )
    draw[(rows,)](
        *row, *settings, *statistics, group_max, block_weight, listed, values, ids,
        tokens, logprobs, **sizes, GROUP=t.group, GROUPS=triton.next_power_of_2(groups),
        CAPACITY=t.capacity, LISTED=t.listed, GUESS=t.guess, num_warps=8, maxnreg=128,
        enable_fp_fusion=True,
    )  # fmt: skip
    search[(rows,)](
        *row, *settings, *statistics, values, tokens, logprobs, BLOCK=t.search_block,
        BLOCKS=sizes["BLOCKS"], PIVOTS=t.pivots, ROUNDS=t.rounds, CAPACITY=t.capacity,
        num_warps=8, maxnreg=192, enable_fp_fusion=True,
    )  # fmt: skip
    return tokens, logprobs


# What a kernel reads or writes one number a row or block of begins anywhere, as in a buffer that
# the host filled: no variants for addresses that are multiples of 16.
@jit(do_not_specialize=["block_max", "block_sum"])
def summarise(
    logits, row_stride, vocab, block_max, block_sum, blocks, group_max,
    BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Maxima of all groups of tokens; max and sum exp(x - max) of every block."""
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    group = tl.arange(0, BLOCK // GROUP)
    v = (program % blocks) * BLOCK + group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    start = logits + row * row_stride
    # Of an odd vocabulary, a mask would split all loads into single elements.
    if (program % blocks + 1) * BLOCK <= vocab:
        x = tl.load(start + v)
    else:
        x = tl.load(start + v, mask=v < vocab, other=-float("inf"))
    x = x.to(tl.float32)
    largest_of_group = tl.max(x, 1)
    first_group = program.to(tl.int64) * (BLOCK // GROUP)
    tl.store(group_max + first_group + group, largest_of_group)
    largest = tl.max(largest_of_group, 0)
    # Without anything allowed in the block, any finite number does; NaN shows in the sum alone.
    exponentials = tl.exp(x - tl.where(largest == -float("inf"), 0.0, largest))
    tl.store(block_max + program, largest)
    tl.store(block_sum + program, tl.sum(tl.sum(exponentials, 1), 0))


@jit(
    do_not_specialize=[
        "temperatures", "top_ks", "top_ps", "min_ps", "block_max", "block_sum", "block_weight",
    ]
)  # fmt: skip
def block_weights(
    logits, row_stride, vocab, temperatures, top_ks, top_ps, min_ps,
    block_max, block_sum, blocks, block_weight, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The sum of every block's integer weights, for rows that need them."""
    # The last read comes first: the end of the logits is what the L2 cache still holds.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    temperature = tl.load(temperatures + row)
    top_k = tl.load(top_ks + row)
    if (temperature > 0) & ((top_k == 0) | (top_k >= vocab)):
        largest, _, usable = row_statistics(block_max, block_sum, row, blocks, BLOCKS)
        least = tl.full((), 1, tl.int64)
        cut = cut_off(largest, temperature)
        if tl.load(top_ps + row) >= 1:  # else min-p comes after top-p has seen all weights
            min_p = tl.load(min_ps + row)
            least = tl.maximum(least, tl.ceil(min_p * WEIGHT_ONE).to(tl.int64))
            # tl.log of 0 is -inf. A little lower than min-p: exp and log are not exact.
            reach = (0.01 - tl.log(min_p.to(tl.float32))) * temperature
            cut = tl.maximum(cut, largest - tl.where(min_p > 0, reach, float("inf")))
        total = tl.zeros((), tl.int64)
        if usable & (tl.load(block_max + program) >= cut):
            v = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(logits + row * row_stride + v, mask=v < vocab, other=-float("inf"))
            weight = integer_weight(x.to(tl.float32), largest, temperature)
            total = tl.sum(tl.where(weight >= least, weight, 0), 0)
        tl.store(block_weight + program, total)


# Whether rows begin at a multiple of 16 is not worth knowing here: a row's few groups are waited
# for as often, and to load them in vectors takes registers, and with them room for programs.
@jit(
    do_not_specialize=[
        "row_stride", "temperatures", "top_ks", "top_ps", "min_ps", "seeds", "candidates",
        "positions", "block_max", "block_sum", "block_weight", "tokens", "logprobs",
    ]
)  # fmt: skip
def draw(
    logits, row_stride, vocab,
    temperatures, top_ks, top_ps, min_ps, seeds, candidates, positions,
    block_max, block_sum, blocks, group_max, block_weight, listed, values, ids, tokens, logprobs,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    CAPACITY: tl.constexpr, LISTED: tl.constexpr, GUESS: tl.constexpr,
):  # fmt: skip
    """The token of each row; -1 where the survivors are too many, or not enough for top-p."""
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * row_stride
    temperature = tl.load(temperatures + row)
    top_k = tl.load(top_ks + row)
    top_p = tl.load(top_ps + row)
    least = tl.ceil(tl.load(min_ps + row) * WEIGHT_ONE).to(tl.int64)
    least = tl.maximum(least, 1)
    largest, normaliser, usable = row_statistics(block_max, block_sum, row, blocks, BLOCKS)
    groups = blocks * (BLOCK // GROUP)
    has_top_k = (top_k > 0) & (top_k < vocab)
    token = tl.zeros((), tl.int64)

    if usable:
        if temperature == 0:
            g = tl.arange(0, GROUPS)
            maxima = tl.load(group_max + row * groups + g, mask=g < groups, other=-float("inf"))
            first = tl.min(tl.where(maxima == largest, g, GROUPS), 0)
            v = first * GROUP + tl.arange(0, GROUP)
            x = tl.load(start + v, mask=v < vocab, other=-float("inf")).to(tl.float32)
            token = tl.min(tl.where(x == largest, v, vocab), 0).to(tl.int64)
        else:
            u = uniform_kernel(
                tl.load(seeds + row), tl.load(candidates + row), tl.load(positions + row)
            )
            sums = row * blocks + tl.arange(0, BLOCKS)
            in_row = tl.arange(0, BLOCKS) < blocks
            if has_top_k | (top_p < 1):
                n, bound = gather_survivors(
                    start, vocab, group_max + row * groups, groups,
                    listed + row * groups, values + row * CAPACITY, ids + row * CAPACITY,
                    cut_off(largest, temperature), largest,
                    tl.where(has_top_k, top_k, GUESS),
                    GROUP, GROUPS, CAPACITY, LISTED,
                )  # fmt: skip
                token = tl.full((), -1, tl.int64)
                if n <= CAPACITY:
                    i = tl.arange(0, CAPACITY)
                    x = tl.load(values + row * CAPACITY + i, mask=i < n, other=-float("inf"))
                    weight = integer_weight(x, largest, temperature)
                    # Whether every token that may be kept is among the survivors.
                    complete = has_top_k | (bound <= cut_off(largest, temperature))
                    if has_top_k:
                        low = order_key(bound).to(tl.int64)
                        high = order_key(largest).to(tl.int64) + 1
                        one = (i < n).to(tl.int64)
                        kth, _ = bisect(order_key(x), one, tl.minimum(top_k, n), low, high, 0)
                        weight = tl.where(order_key(x) >= kth, weight, 0)
                    if top_p < 1:
                        total = tl.sum(weight, 0)
                        if not has_top_k:
                            total = tl.sum(tl.load(block_weight + sums, mask=in_row, other=0), 0)
                        needed = top_p_mass(top_p, total)
                        low = tl.zeros((), tl.int64)
                        high = tl.full((), WEIGHT_ONE_KEY + 1, tl.int64)
                        key = order_key(weight.to(tl.float32))
                        level, reached = bisect(key, weight, needed, low, high, 0)
                        # What is left out must lie below the level, exp's rounding granted.
                        ceiling = integer_weight(bound, largest, temperature).to(tl.float32)
                        complete = complete | (level > order_key(ceiling * 1.00001 + 1))
                        complete = complete & (reached >= needed)
                        weight = tl.where(key >= level, weight, 0)
                    weight = tl.where(weight >= least, weight, 0)
                    if complete:
                        found = draw_in_order(weight, tl.sum(weight, 0), u)
                        token = tl.load(ids + row * CAPACITY + found).to(tl.int64)
            else:
                weight = tl.load(block_weight + sums, mask=in_row, other=0)
                total = tl.sum(weight, 0)
                target = tl.minimum((u * total.to(tl.float64)).to(tl.int64), total - 1)
                running = tl.cumsum(weight, 0)
                block = tl.sum((running <= target).to(tl.int32), 0)
                before = tl.sum(tl.where(tl.arange(0, BLOCKS) < block, weight, 0), 0)
                v = block * BLOCK + tl.arange(0, BLOCK)
                x = tl.load(start + v, mask=v < vocab, other=-float("inf")).to(tl.float32)
                weight = integer_weight(x, largest, temperature)
                running = before + tl.cumsum(tl.where(weight >= least, weight, 0), 0)
                token = (block * BLOCK + tl.sum((running <= target).to(tl.int32), 0)).to(tl.int64)
    if token >= 0:
        x = tl.load(start + token).to(tl.float32)
        tl.store(logprobs + row, tl.where(usable, x - largest - tl.log(normaliser), float("nan")))
    tl.store(tokens + row, token)


@jit
def gather_survivors(
    start, vocab, group_max, groups, listed, values, ids, cut, largest, wanted,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, CAPACITY: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Writes all (logit, id) >= a bound, by id, where at least ``wanted`` groups reach the bound.

    Returns their number, more than CAPACITY if they do not fit, and the bound. Tokens below
    ``cut`` weigh nothing and are left out in any case.
    """
    g = tl.arange(0, GROUPS)
    maxima = tl.load(group_max + g, mask=g < groups, other=-float("inf"))
    bound = cut
    if tl.sum((maxima >= cut).to(tl.int32), 0) > wanted:
        low = order_key(cut).to(tl.int64)
        high = order_key(largest).to(tl.int64) + 1
        # A quarter more groups than wanted do no harm, and save half of the steps.
        one = (g < groups).to(tl.int64)
        key, _ = bisect(order_key(maxima), one, wanted, low, high, wanted // 4)
        bound = key_value(key.to(tl.int32))
    chosen = (maxima >= bound) & (maxima > -float("inf"))
    count = tl.sum(chosen.to(tl.int32), 0)
    tl.store(listed + tl.cumsum(chosen.to(tl.int32), 0) - 1, g, mask=chosen)
    tl.debug_barrier()

    n = tl.zeros((), tl.int32)
    first = tl.zeros((), tl.int32)
    while (first < count) & (n <= CAPACITY):
        place = first + tl.arange(0, LISTED)
        group = tl.load(listed + place, mask=place < count, other=0)
        v = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        x = tl.load(start + v, mask=(place < count)[:, None] & (v < vocab), other=-float("inf"))
        x = tl.reshape(x, (LISTED * GROUP,)).to(tl.float32)
        v = tl.reshape(v, (LISTED * GROUP,))
        survives = (x >= bound) & (x > -float("inf"))
        index = n + tl.cumsum(survives.to(tl.int32), 0) - 1
        tl.store(values + index, x, mask=survives & (index < CAPACITY))
        tl.store(ids + index, v, mask=survives & (index < CAPACITY))
        n += tl.sum(survives.to(tl.int32), 0)
        first += LISTED
    tl.debug_barrier()
    return n, bound


@jit
def key_value(key):
    """The float whose order_key it is."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
