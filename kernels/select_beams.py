"""Score the candidates of a round and choose the best of them: one call for many rounds.

    token_score_t = sum over guides g of  weight_g * (tuned_g[t] - untuned_g[t])
    score_c       = previous_c + sum of the token_scores of its chunk          (float64)
    rank of c     = how many of its round beat it: a better score, or the same and a lower index

Candidates with the same tokens get the score of the first of them, bit for bit: they ran in
different rows of a batched product, and its rounding must not decide between them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from w2s_fast.kernels.library import jit, register, tl, triton

MAX_CANDIDATES = 1024  # of one round in one program; more are ranked by torch


class Selection(NamedTuple):
    """What :func:`select_beams` finds.

    Attributes:
        token_scores: float64 [T], each new token's weighted log-ratio, added over the guides.
        scores: float64 [C], sums over whole responses.
        kept: int32 [R, W], indices of a round's best candidates among its own, best first; -1
            where it has no more.
        parents: int32 [R, W], the parents of those kept; -1 likewise.
        broken: int32 [C], the first of a candidate's new tokens (an index into T) whose score is
            not finite; -1 if all are. A broken candidate is never kept before a sound one.
    """

    token_scores: Tensor
    scores: Tensor
    kept: Tensor
    parents: Tensor
    broken: Tensor


def select_beams(
    tuned: Tensor,
    untuned: Tensor,
    weights: Tensor,
    tokens: Tensor,
    cu_tokens: Tensor,
    previous: Tensor,
    lengths: Tensor,
    parents: Tensor,
    siblings: Tensor,
    cu_candidates: Tensor,
    width: Tensor,
    mean: Tensor,
    dedup: Tensor,
    max_candidates: int,
    max_width: int,
) -> Selection:
    """Add the log-ratios of ragged chunks to the scores, and rank every round's candidates.

    A round is one request's: its candidates compete with each other, and with no others.

    Args:
        tuned, untuned: float32 [G, T], log-probs of the new tokens of all candidates, one
            candidate after the other, under both models of each guide.
        weights: float64 [G].
        tokens: int64 [T], the new tokens themselves.
        cu_tokens: int64 [C + 1]; candidate c's tokens are cu_tokens[c] : cu_tokens[c + 1]. None
            for a finished hypothesis that is held: it keeps its previous score.
        previous: float64 [C], the sum of each candidate's scores before this chunk.
        lengths: int64 [C], tokens of each whole response, new ones included; >= 1.
        parents: int32 [C], handed through to the result.
        siblings: int64 [C]; two candidates of a round had the same tokens before this chunk if,
            and only if, these are equal.
        cu_candidates: int64 [R + 1]; round r's candidates are cu_candidates[r : r + 2].
        width: int64 [R], how many a round keeps at most.
        mean: bool [R]; True ranks by score / length. The scores returned are sums all the same.
        dedup: bool [R]; True keeps only the first of several candidates with the same tokens.
        max_candidates, max_width: the largest number of candidates of, and kept by, one round_of.
    """
    return Selection(
        *_operator(
            tuned, untuned, weights, tokens, cu_tokens, previous, lengths, parents, siblings,
            cu_candidates, width, mean, dedup, max_candidates, max_width,
        )
    )  # fmt: skip


def _torch(
    tuned: Tensor,
    untuned: Tensor,
    weights: Tensor,
    tokens: Tensor,
    cu_tokens: Tensor,
    previous: Tensor,
    lengths: Tensor,
    parents: Tensor,
    siblings: Tensor,
    cu_candidates: Tensor,
    width: Tensor,
    mean: Tensor,
    dedup: Tensor,
    max_candidates: int,
    max_width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    device = tokens.device
    candidates, rounds = len(previous), len(width)
    index = torch.arange(candidates, device=device)
    round_of = torch.repeat_interleave(
        torch.arange(rounds, device=device), cu_candidates.diff(), output_size=candidates
    )
    counts = cu_tokens.diff()
    owner = torch.repeat_interleave(index, counts, output_size=len(tokens))

    token_scores = (weights[:, None] * (tuned.double() - untuned.double())).sum(0)
    scores = previous + torch.segment_reduce(token_scores, "sum", lengths=counts, initial=0.0)
    where = torch.arange(len(tokens), device=device)
    bad = torch.where(token_scores.isfinite(), len(tokens), where)
    broken = torch.full_like(index, len(tokens)).scatter_reduce(0, owner, bad, "amin")
    broken = torch.where(broken < len(tokens), broken, -1)

    first = _first_with_same_tokens(round_of, siblings, tokens, counts, owner, where, cu_tokens)
    scores = scores[first]
    ranked = torch.where(mean[round_of], scores / lengths, scores)
    ranked = torch.where(ranked.isfinite(), ranked, -torch.inf)
    eligible = ~dedup[round_of] | (first == index)

    order = torch.where(eligible, ranked, -torch.inf).argsort(descending=True, stable=True)
    order = order[(~eligible[order]).long().argsort(stable=True)]
    order = order[round_of[order].argsort(stable=True)]  # by round, eligible, score, index
    rank = index - cu_candidates[round_of[order]]
    chosen = order[(rank < width[round_of[order]]) & eligible[order]]
    rank = rank[(rank < width[round_of[order]]) & eligible[order]]
    kept = torch.full((rounds, max_width), -1, dtype=torch.int32, device=device)
    kept[round_of[chosen], rank] = (chosen - cu_candidates[round_of[chosen]]).int()
    kept_parents = torch.full_like(kept, -1)
    kept_parents[round_of[chosen], rank] = parents[chosen]
    return token_scores, scores, kept, kept_parents, broken.int()


def _first_with_same_tokens(
    round_of: Tensor,
    siblings: Tensor,
    tokens: Tensor,
    counts: Tensor,
    owner: Tensor,
    where: Tensor,
    cu_tokens: Tensor,
) -> Tensor:
    """For each candidate the lowest index of one in its round with the same tokens."""
    longest = int(counts.max()) if len(counts) else 0
    padded = torch.full((len(counts), longest), -1, dtype=torch.int64, device=tokens.device)
    padded[owner, where - cu_tokens[owner]] = tokens
    rows = torch.cat([torch.stack([round_of, siblings, counts], 1), padded], 1)
    _, kind = torch.unique(rows, dim=0, return_inverse=True)
    index = torch.arange(len(counts), device=tokens.device)
    first = torch.full_like(index, len(counts)).scatter_reduce(0, kind, index, "amin")
    return first[kind]


def _fake(
    tuned: Tensor,
    untuned: Tensor,
    weights: Tensor,
    tokens: Tensor,
    cu_tokens: Tensor,
    previous: Tensor,
    lengths: Tensor,
    parents: Tensor,
    siblings: Tensor,
    cu_candidates: Tensor,
    width: Tensor,
    mean: Tensor,
    dedup: Tensor,
    max_candidates: int,
    max_width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    kept = width.new_empty((width.shape[0], max_width), dtype=torch.int32)
    return (
        previous.new_empty(tokens.shape[0]),
        torch.empty_like(previous),
        kept,
        torch.empty_like(kept),
        torch.empty_like(parents),
    )


def _triton(
    tuned: Tensor,
    untuned: Tensor,
    weights: Tensor,
    tokens: Tensor,
    cu_tokens: Tensor,
    previous: Tensor,
    lengths: Tensor,
    parents: Tensor,
    siblings: Tensor,
    cu_candidates: Tensor,
    width: Tensor,
    mean: Tensor,
    dedup: Tensor,
    max_candidates: int,
    max_width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    out = _fake(
        tuned, untuned, weights, tokens, cu_tokens, previous, lengths, parents, siblings,
        cu_candidates, width, mean, dedup, max_candidates, max_width,
    )  # fmt: skip
    if max_candidates > MAX_CANDIDATES:
        return _torch(
            tuned, untuned, weights, tokens, cu_tokens, previous, lengths, parents, siblings,
            cu_candidates, width, mean, dedup, max_candidates, max_width,
        )  # fmt: skip
    if len(width):
        # Scratch that one program writes and all of its threads read: a hash of the new tokens.
        hashes = torch.empty_like(siblings)
        _one_round[(len(width),)](
            tuned, untuned, weights, tokens, cu_tokens, previous, lengths, parents, siblings,
            cu_candidates, width, mean, dedup, hashes, *out, len(tokens), max_width,
            GUIDES=len(weights), **launch_options(max_candidates, max_width),
            enable_fp_fusion=False,  # the same roundings as torch's
        )  # fmt: skip
    return out


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
def _one_round(
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


_operator = register(
    "select_beams(Tensor tuned, Tensor untuned, Tensor weights, Tensor tokens, Tensor cu_tokens,"
    " Tensor previous, Tensor lengths, Tensor parents, Tensor siblings, Tensor cu_candidates,"
    " Tensor width, Tensor mean, Tensor dedup, int max_candidates, int max_width)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    torch_path=_torch,
    triton_path=_triton,
    fake=_fake,
)
