"""select_beams on a GPU: one program a round."""

from __future__ import annotations

from w2s_fast.kernels.library import jit, tl, triton


def launch_options(max_candidates: int, max_width: int) -> dict[str, int]:
    """Block sizes of the kernel: fixed by the number of candidates.

    On an H100, 64 rounds of 16 candidates of 5 tokens take 4.2 us, 8 of 64 of 30 tokens 12.4
    (`python -m bench.kernels`).

    A thread works on few pairs (candidate, token) or (candidate, other) at a time: more would not
    fit into its registers, in float64 and with addresses of 64 bits. 32 warps have 64 of them, and
    the compiler aims at as few for 8 and for 16.
    """
    candidates = max(16, triton.next_power_of_2(max_candidates))
    num_warps = max(4, candidates // 32)
    pairs = 4 if num_warps == 4 else 2
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
    cu_candidates, width, mean, dedup, counts, hashes, values,
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
    # Within a round tokens are counted in 32 bits, from the first one on.
    origin = tl.load(cu_tokens + begin)
    tokens += origin
    token_scores += origin
    start = (tl.load(cu_tokens + c, mask=real, other=0) - origin).to(tl.int32)
    end = (tl.load(cu_tokens + c + 1, mask=real, other=0) - origin).to(tl.int32)
    length = tl.where(real, end - start, 0)
    for first in range(0, tl.max(length, 0), TOKENS):
        step = first + tl.arange(0, TOKENS)
        inside = step[None, :] < length[:, None]
        t = start[:, None] + step[None, :]
        score = tl.zeros([CANDIDATES, TOKENS], tl.float64)
        for g in range(GUIDES):
            row = origin + g * num_tokens
            above = tl.load(tuned + row + t, mask=inside, other=0.0).to(tl.float64)
            below = tl.load(untuned + row + t, mask=inside, other=0.0).to(tl.float64)
            score += tl.load(weights + g) * (above - below)
        tl.store(token_scores + t, score, mask=inside)
    choose(
        r, begin, count, origin, start, length, tokens, cu_tokens, previous, lengths, parents,
        siblings, width, mean, dedup, counts, hashes, values, token_scores, scores, kept,
        kept_parents, broken, max_width, False, CANDIDATES, OTHERS, TOKENS, WIDTH,
    )  # fmt: skip


@jit
def choose(
    r, begin, count, origin, start, length, tokens, cu_tokens, previous, lengths, parents, siblings,
    width, mean, dedup, counts, hashes, values, token_scores, scores, kept, kept_parents,
    broken, max_width, LENGTHS_BEFORE: tl.constexpr,
    CANDIDATES: tl.constexpr, OTHERS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Scores and ranks of round r's candidates, whose token_scores are stored.

    origin: where the round's new tokens begin; tokens and token_scores point there. start, length:
    int32 [CANDIDATES], where those of each candidate begin, from there on, and how many there are.
    LENGTHS_BEFORE: whether lengths are without them. counts, hashes, values: scratch [C] that one
    program writes and all of its threads read.
    """
    own = tl.arange(0, CANDIDATES)
    real = own < count
    c = begin + own

    # 1. Hashes that say which candidates may have the same tokens; and sums, token by token: how
    # many candidates there are, and with it every tile, must not decide their rounding.
    hashed = tl.zeros([CANDIDATES], tl.int64)
    for first in range(0, tl.max(length, 0), TOKENS):
        step = first + tl.arange(0, TOKENS)
        inside = step[None, :] < length[:, None]
        token = tl.load(tokens + start[:, None] + step[None, :], mask=inside, other=0)
        hashed += tl.sum(tl.where(inside, _mixed(token * 2097152 + step[None, :]), 0), 1)
    tl.store(counts + c, length, mask=real)
    tl.store(hashes + c, hashed, mask=real)
    tl.debug_barrier()  # every thread reads what all have stored
    added = tl.zeros([CANDIDATES], tl.float64)
    bad = length
    for t in range(tl.max(length, 0)):
        score = tl.load(token_scores + start + t, mask=t < length, other=0.0)
        added += score
        bad = tl.where(tl.abs(score) < float("inf"), bad, tl.minimum(bad, t))  # NaN is bad, too
    total = tl.load(previous + c, mask=real, other=0.0) + added
    tl.store(scores + c, total, mask=real)
    tl.store(broken + c, tl.where(bad < length, origin + start + bad, -1), mask=real)

    # 2. The first candidate with the same tokens: the first of equal hash, if its tokens are equal.
    family = tl.load(siblings + c, mask=real, other=0)
    twin = own
    for block in range(0, count, OTHERS):
        other = block + tl.arange(0, OTHERS)
        known = other < count
        o = begin + other
        o_length = tl.load(counts + o, mask=known, other=0)
        o_family = tl.load(siblings + o, mask=known, other=0)
        o_hash = tl.load(hashes + o, mask=known, other=0)
        same = (o_hash[None, :] == hashed[:, None]) & (o_family[None, :] == family[:, None])
        same = same & (o_length[None, :] == length[:, None]) & known[None, :]
        twin = tl.minimum(twin, tl.min(tl.where(same, other[None, :], CANDIDATES), 1))
    twin_start = (tl.load(cu_tokens + begin + twin, mask=real, other=0) - origin).to(tl.int32)
    differ = tl.zeros([CANDIDATES], tl.int32)
    for first in range(0, tl.max(length, 0), TOKENS):
        step = first + tl.arange(0, TOKENS)
        inside = step[None, :] < length[:, None]
        mine = tl.load(tokens + start[:, None] + step[None, :], mask=inside, other=0)
        its = tl.load(tokens + twin_start[:, None] + step[None, :], mask=inside, other=0)
        differ = tl.maximum(differ, tl.max((mine != its).to(tl.int32), 1))
    twin = tl.where(differ > 0, own, twin)
    tl.debug_barrier()
    total = tl.load(scores + begin + twin, mask=real, other=0.0)

    # 3. Ranks. A duplicate to be dropped is NaN: it is ahead of nobody. A broken one loses to all
    # sound ones.
    by_mean = tl.load(mean + r).to(tl.int32) != 0
    whole = tl.load(lengths + c, mask=real, other=1)
    if LENGTHS_BEFORE:
        whole += length
    value = tl.where(by_mean, total / whole.to(tl.float64), total)
    value = tl.where(tl.abs(value) < float("inf"), value, -float("inf"))
    eligible = real & (tl.load(dedup + r).to(tl.int32) * (twin - own) == 0)
    tl.store(values + c, tl.where(eligible, value, float("nan")), mask=real)
    tl.debug_barrier()  # all have read the scores before any is replaced
    tl.store(scores + c, total, mask=real)
    rank = tl.zeros([CANDIDATES], tl.int32)
    for block in range(0, count, OTHERS):
        other = block + tl.arange(0, OTHERS)
        o_value = tl.load(values + begin + other, mask=other < count, other=float("nan"))
        ahead = (o_value[None, :] > value[:, None]) | (
            (o_value[None, :] == value[:, None]) & (other[None, :] < own[:, None])
        )
        rank += tl.sum(ahead.to(tl.int32), 1)
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
