"""select_beams on a GPU: one program a round."""

from __future__ import annotations

from w2s_fast.kernels.library import jit, tl, triton


def launch_options(max_candidates: int, max_width: int) -> dict[str, int]:
    """Block sizes of the kernel: fixed by the number of candidates. Not measured on a GPU.

    A thread works on few pairs (candidate, token) or (candidate, other) at a time: more would not
    fit into its registers, in float64 and with addresses of 64 bits.
    """
    candidates = max(16, triton.next_power_of_2(max_candidates))
    num_warps = min(16, max(4, candidates // 32))
    pairs = 4 if num_warps <= 8 else 2  # 16 warps have 128 registers a thread, 8 have 255
    other = max(1, pairs * 32 * num_warps // candidates)
    return {
        "CANDIDATES": candidates,
        "OTHERS": min(candidates, other),
        "TOKENS": min(16, other),
        "WIDTH": triton.next_power_of_2(max_width),
        "num_warps": num_warps,
    }


@jit(do_not_specialize=["num_tokens", "max_width"])
def one_round(
    tuned, untuned, weights, tokens, cu_tokens, previous, lengths, parents, siblings,
    cu_candidates, width, mean, dedup, hashes,
    token_scores, scores, kept, kept_parents, broken, num_tokens, max_width,
    GUIDES: tl.constexpr, CANDIDATES: tl.constexpr, OTHERS: tl.constexpr, TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0)
    begin = tl.load(cu_candidates + r)
    count = (tl.load(cu_candidates + r + 1) - begin).to(tl.int32)
    own = tl.arange(0, CANDIDATES)
    real = own < count
    c = begin + own
    start = tl.load(cu_tokens + c, mask=real, other=0)
    length = tl.load(cu_tokens + c + 1, mask=real, other=0) - start
    length = tl.where(real, length, 0)

    # 1. Sums, and hashes that say which candidates may have the same tokens.
    total = tl.load(previous + c, mask=real, other=0.0)
    bad = tl.zeros([CANDIDATES], tl.int64) + num_tokens
    hashed = tl.zeros([CANDIDATES], tl.int64)
    for first in range(0, tl.max(length, 0), TOKENS):
        step = first + tl.arange(0, TOKENS)
        inside = step[None, :] < length[:, None]
        t = start[:, None] + step[None, :]
        score = tl.zeros([CANDIDATES, TOKENS], tl.float64)
        for g in range(GUIDES):
            above = tl.load(tuned + g * num_tokens + t, mask=inside, other=0.0).to(tl.float64)
            below = tl.load(untuned + g * num_tokens + t, mask=inside, other=0.0).to(tl.float64)
            score += tl.load(weights + g) * (above - below)
        tl.store(token_scores + t, score, mask=inside)
        finite = tl.abs(score) < float("inf")  # False for NaN, too
        bad = tl.minimum(bad, tl.min(tl.where(inside & (finite == 0), t, num_tokens), 1))
        total += tl.sum(score, 1)
        token = tl.load(tokens + t, mask=inside, other=0)
        hashed += tl.sum(tl.where(inside, _mixed(token * 2097152 + step[None, :]), 0), 1)
    tl.store(broken + c, tl.where(bad < num_tokens, bad, -1).to(tl.int32), mask=real)
    tl.store(hashes + c, hashed, mask=real)
    tl.store(scores + c, total, mask=real)
    tl.debug_barrier()  # every thread reads what all have stored

    # 2. The first candidate with the same tokens: the first of equal hash, if its tokens are equal.
    family = tl.load(siblings + c, mask=real, other=0)
    twin = own
    for block in range(0, count, OTHERS):
        other = block + tl.arange(0, OTHERS)
        known = other < count
        o = begin + other
        o_start = tl.load(cu_tokens + o, mask=known, other=0)
        o_length = tl.load(cu_tokens + o + 1, mask=known, other=0) - o_start
        o_family = tl.load(siblings + o, mask=known, other=0)
        o_hash = tl.load(hashes + o, mask=known, other=0)
        same = (o_hash[None, :] == hashed[:, None]) & (o_family[None, :] == family[:, None])
        same = same & (o_length[None, :] == length[:, None]) & known[None, :]
        twin = tl.minimum(twin, tl.min(tl.where(same, other[None, :], CANDIDATES), 1))
    twin_start = tl.load(cu_tokens + begin + twin, mask=real, other=0)
    differ = tl.zeros([CANDIDATES], tl.int32)
    for first in range(0, tl.max(length, 0), TOKENS):
        step = first + tl.arange(0, TOKENS)
        inside = step[None, :] < length[:, None]
        mine = tl.load(tokens + start[:, None] + step[None, :], mask=inside, other=0)
        its = tl.load(tokens + twin_start[:, None] + step[None, :], mask=inside, other=0)
        differ = tl.maximum(differ, tl.max((mine != its).to(tl.int32), 1))
    twin = tl.where(differ > 0, own, twin)
    total = tl.load(scores + begin + twin, mask=real, other=0.0)
    tl.debug_barrier()  # all have read the scores before any is replaced
    tl.store(scores + c, total, mask=real)

    # 3. Ranks. A candidate that is not eligible loses to all; a broken one to all sound ones.
    by_mean = tl.load(mean + r).to(tl.int32) != 0
    whole = tl.load(lengths + c, mask=real, other=1).to(tl.float64)
    value = tl.where(by_mean, total / whole, total)
    value = tl.where(tl.abs(value) < float("inf"), value, -float("inf"))
    drop = tl.load(dedup + r).to(tl.int32) * (twin - own)  # 0, or a duplicate to be dropped
    eligible = real & (drop == 0)
    tl.debug_barrier()
    # Ineligible ones are told apart by their hash scratch, which is not needed any more.
    tl.store(hashes + c, eligible.to(tl.int64), mask=real)
    tl.debug_barrier()
    rank = tl.zeros([CANDIDATES], tl.int32)
    for block in range(0, count, OTHERS):
        other = block + tl.arange(0, OTHERS)
        known = other < count
        o_total = tl.load(scores + begin + other, mask=known, other=0.0)
        o_whole = tl.load(lengths + begin + other, mask=known, other=1).to(tl.float64)
        o_value = tl.where(by_mean, o_total / o_whole, o_total)
        o_value = tl.where(tl.abs(o_value) < float("inf"), o_value, -float("inf"))
        o_eligible = tl.load(hashes + begin + other, mask=known, other=0) != 0
        ahead = (o_value[None, :] > value[:, None]) | (
            (o_value[None, :] == value[:, None]) & (other[None, :] < own[:, None])
        )
        rank += tl.sum((ahead & o_eligible[None, :]).to(tl.int32), 1)
    places = tl.minimum(tl.load(width + r).to(tl.int32), tl.sum(eligible.to(tl.int32), 0))
    wins = eligible & (rank < places)
    row = r.to(tl.int64) * max_width
    tl.store(kept + row + rank, own, mask=wins)
    tl.store(kept_parents + row + rank, tl.load(parents + c, mask=real, other=-1), mask=wins)
    place = tl.arange(0, WIDTH)
    unused = (place >= places) & (place < max_width)
    tl.store(kept + row + place, -1, mask=unused)
    tl.store(kept_parents + row + place, -1, mask=unused)


@jit
def _mixed(x):
    """The finalizer of SplitMix64: every bit of the input moves about half of the output's."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
