"""Score the candidates of a round and choose the best of them: one call for many rounds.

    token_score_t = sum over guides g of  weight_g * (tuned_g[t] - untuned_g[t])
    score_c       = previous_c + sum of the token_scores of its chunk          (float64)
    rank of c     = how many of its round beat it: a better score, or the same and a lower index

Candidates with the same tokens get the score of the first of them, bit for bit: they ran in
different rows of a batched product, and its rounding must not decide between them. The kernel is in
select_beams_triton.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from w2s_fast.kernels.library import register
from w2s_fast.kernels.select_beams_triton import launch_options, one_round

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
        max_candidates, max_width: no round has, or keeps, more. The result has max_width columns;
            nothing else in it depends on how far these bounds lie above.
    """
    return Selection(
        *_operator(
            tuned, untuned, weights, tokens, cu_tokens, previous, lengths, parents, siblings,
            cu_candidates, width, mean, dedup, max_candidates, max_width,
        )
    )  # fmt: skip


def select_in_torch(
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
    """The operator in plain torch, on any device."""
    device = tokens.device
    candidates, rounds = len(previous), len(width)
    if not candidates:  # which some of torch's operators do not take
        kept = torch.full((rounds, max_width), -1, dtype=torch.int32, device=device)
        none = parents.new_empty(0)
        return tokens.new_empty(0, dtype=torch.float64), previous, kept, kept.clone(), none
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
    longest = int(counts.max())
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
        return select_in_torch(
            tuned, untuned, weights, tokens, cu_tokens, previous, lengths, parents, siblings,
            cu_candidates, width, mean, dedup, max_candidates, max_width,
        )  # fmt: skip
    if len(width):
        scratch = (lengths, siblings, previous)  # of their sizes and types: see the kernel
        one_round[(len(width),)](
            tuned, untuned, weights, tokens, cu_tokens, previous, lengths, parents, siblings,
            cu_candidates, width, mean, dedup, *map(torch.empty_like, scratch), *out, len(tokens),
            max_width,
            GUIDES=len(weights), **launch_options(max_candidates, max_width),
            enable_fp_fusion=False,  # the same roundings as torch's
        )  # fmt: skip
    return out


_operator = register(
    "select_beams(Tensor tuned, Tensor untuned, Tensor weights, Tensor tokens, Tensor cu_tokens,"
    " Tensor previous, Tensor lengths, Tensor parents, Tensor siblings, Tensor cu_candidates,"
    " Tensor width, Tensor mean, Tensor dedup, int max_candidates, int max_width)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    torch_path=select_in_torch,
    triton_path=_triton,
    fake=_fake,
)
