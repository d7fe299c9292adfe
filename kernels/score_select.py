"""From partial log-probs to kept candidates, for many rounds at once, and all in one buffer.

What linear_logprob's second half, a weighted difference and select_beams do one after the other,
over chunks as they were drawn: nobody has looked yet at where they end.

    n_c           = tokens of candidate c's chunk up to and including the first that ends a response
    log p_t       = Partials.logprobs()_t                            (linear_logprob_partials)
    token_score_t = sum over guides g of  weight_g * (tuned_g[t] - untuned_g[t])
    score_c       = previous_c + sum of the first n_c token_scores of its chunk        (float64)
    rank of c     = as in select_beams, of responses of lengths_c + n_c tokens

Bit for bit what those operators give for chunks that were cut by hand. No launch depends on a value
that the host would have to read, so a CUDA graph may hold it all. The kernels are in
score_select_triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from w2s_fast.kernels.library import register
from w2s_fast.kernels.linear_logprob_partials import Partials
from w2s_fast.kernels.logsumexp import MERGE_BLOCK, MERGE_OPTIONS
from w2s_fast.kernels.score_select_triton import add_guide, choose_round
from w2s_fast.kernels.select_beams import MAX_CANDIDATES, select_in_torch
from w2s_fast.kernels.select_beams_triton import launch_options


class ScoreSelection(NamedTuple):
    """What :func:`score_select` finds: views of its buffer, which holds them in this order.

    Words of 64 bits, integers or floats. What belongs to no candidate of a round, where arguments
    are longer than their ``cu_`` say, means nothing.

    Attributes:
        kept: int64 [R, W], indices of a round's best candidates among its own, best first; -1
            where it has no more.
        parents: int64 [R, W], the parents of those kept; -1 likewise.
        scores: float64 [C], sums over whole responses.
        counts: int64 [C], how many tokens of a candidate's chunk are its own.
        broken: int64 [C], the first of those (an index into T) whose score is not finite; -1 if all
            are. A broken candidate is never kept before a sound one.
        broken_base: int64 [C], the first of those whose log-prob under the base is not finite; -1.
        tokens: int64 [T], as given.
        logprobs: float64 [T], as given.
        token_scores: float64 [T]; 0 behind a chunk's end.
    """

    kept: Tensor
    parents: Tensor
    scores: Tensor
    counts: Tensor
    broken: Tensor
    broken_base: Tensor
    tokens: Tensor
    logprobs: Tensor
    token_scores: Tensor

    @classmethod
    def unpack(
        cls, packed: Tensor, rounds: int, candidates: int, tokens: int, max_width: int
    ) -> ScoreSelection:
        """The views of a buffer, wherever it lies, of a call with these R, C, T and W."""
        words = list(packed.split(_sizes(rounds, candidates, tokens, max_width)))
        for table in (0, 1):
            words[table] = words[table].view(rounds, max_width)
        for floats in (2, 7, 8):
            words[floats] = words[floats].view(torch.float64)
        return cls(*words)


def packed_words(rounds: int, candidates: int, tokens: int, max_width: int) -> int:
    """Words of 64 bits of the buffer of a call with these R, C, T and W."""
    return sum(_sizes(rounds, candidates, tokens, max_width))


def _sizes(rounds: int, candidates: int, tokens: int, max_width: int) -> list[int]:
    return [rounds * max_width] * 2 + [candidates] * 4 + [tokens] * 3


def score_select(
    guides: Sequence[tuple[Partials, Partials]],
    weights: Tensor,
    tokens: Tensor,
    logprobs: Tensor,
    cu_tokens: Tensor,
    previous: Tensor,
    lengths: Tensor,
    parents: Tensor,
    siblings: Tensor,
    cu_candidates: Tensor,
    stops: Tensor,
    cu_stops: Tensor,
    width: Tensor,
    mean: Tensor,
    dedup: Tensor,
    max_candidates: int,
    max_width: int,
) -> Tensor:
    """Cut chunks where they end, add their log-ratios to the scores, and rank every round.

    A round is one request's: its candidates compete with each other, and with no others. Tokens
    behind a chunk's end are neither scored nor compared.

    Args:
        guides: of each guide what its tuned and its untuned model leave of ``tokens``; finished
            log-probs as :meth:`Partials.of_logprobs`.
        weights: float64 [G].
        tokens: int64 [T], the chunks as drawn, one candidate after the other.
        logprobs: float32 [T], the base's log-probs of them.
        cu_tokens: int64 [C + 1]; candidate c's chunk is cu_tokens[c] : cu_tokens[c + 1]. Empty for
            a finished hypothesis that is held: it keeps its previous score.
        previous: float64 [C], the sum of each candidate's scores before this chunk.
        lengths: int64 [C], tokens of each response before this chunk.
        parents: int32 [C], handed through to the result.
        siblings: int64 [C]; two candidates of a round had the same tokens before this chunk if,
            and only if, these are equal.
        cu_candidates: int64 [R + 1]; round r's candidates are cu_candidates[r : r + 2]. Spare
            rounds, at the end, have none.
        stops: int64 [E], ids that end a response; round r's are cu_stops[r : r + 2].
        cu_stops: int64 [R + 1].
        width: int64 [R], how many a round keeps at most.
        mean: bool [R]; True ranks by score / length. The scores returned are sums all the same.
        dedup: bool [R]; True keeps only the first of several candidates with the same tokens.
        max_candidates, max_width: no round has, or keeps, more. The result has max_width columns;
            nothing else in it depends on how far these bounds lie above. With more than 1,024
            candidates torch does it all, and a CUDA graph cannot hold it.

    Returns:
        int64 [2 * R * max_width + 4 * C + 3 * T], everything that the host wants to know, in one
        buffer: :meth:`ScoreSelection.unpack` it there, after one copy.
    """
    models = [partials for pair in guides for partials in pair]
    if len(weights) == 0 or len(models) != 2 * len(weights):
        raise ValueError(f"{len(weights)} weights and {len(models)} models: two for each of >= 1")
    if any(partials.target.shape != tokens.shape for partials in models):
        shapes = [tuple(partials.target.shape) for partials in models]
        raise ValueError(f"partials of {shapes} tokens must be of {tuple(tokens.shape)} all")
    if logprobs.shape != tokens.shape:
        raise ValueError(f"logprobs {tuple(logprobs.shape)} must be {tuple(tokens.shape)}")
    packed: Tensor = _operator(
        tokens, *map(list, zip(*models)), weights, logprobs, cu_tokens, previous, lengths, parents,
        siblings, cu_candidates, stops, cu_stops, width, mean, dedup, max_candidates, max_width,
    )  # fmt: skip
    return packed


class _Call(NamedTuple):
    """The operator's arguments: the function's, with the models' partials one kind after the other.

    largest, total, target: of the tuned and the untuned model of the first guide, of the second...
    """

    tokens: Tensor
    largest: Sequence[Tensor]
    total: Sequence[Tensor]
    target: Sequence[Tensor]
    weights: Tensor
    logprobs: Tensor
    cu_tokens: Tensor
    previous: Tensor
    lengths: Tensor
    parents: Tensor
    siblings: Tensor
    cu_candidates: Tensor
    stops: Tensor
    cu_stops: Tensor
    width: Tensor
    mean: Tensor
    dedup: Tensor
    max_candidates: int
    max_width: int

    @property
    def models(self) -> list[Partials]:
        return list(map(Partials, self.largest, self.total, self.target))

    @property
    def size(self) -> tuple[int, int, int, int]:
        """R, C, T and W of the result."""
        rounds, candidates = self.width.shape[0], self.previous.shape[0]
        return rounds, candidates, self.tokens.shape[0], self.max_width


def _torch(*arguments: Any) -> Tensor:
    call = _Call(*arguments)
    device = call.tokens.device
    packed = torch.zeros(sum(_sizes(*call.size)), dtype=torch.int64, device=device)
    out = ScoreSelection.unpack(packed, *call.size)
    out.tokens.copy_(call.tokens)
    out.logprobs.copy_(call.logprobs)

    # What there is beyond these is spare.
    candidates, num_stops = int(call.cu_candidates[-1]), int(call.cu_stops[-1])
    starts = call.cu_tokens[: candidates + 1]
    num_tokens = int(starts[-1])
    drawn = starts.diff()
    owner = _indices(drawn, num_tokens)
    round_of = _indices(call.cu_candidates.diff(), candidates)[owner]
    offset = torch.arange(num_tokens, device=device) - starts[owner]
    ends = (call.tokens[:num_tokens, None] == call.stops[:num_stops]) & (
        round_of[:, None] == _indices(call.cu_stops.diff(), num_stops)
    )
    ended = torch.where(ends.any(1), offset + 1, drawn[owner])
    counts = drawn.scatter_reduce(0, owner, ended, "amin")
    own = (offset < counts[owner]).nonzero()[:, 0]

    logprobs = [partials.logprobs()[own] for partials in call.models]
    token_scores, scores, kept, parents, broken = select_in_torch(
        torch.stack(logprobs[::2]), torch.stack(logprobs[1::2]), call.weights, call.tokens[own],
        torch.cat([starts[:1], counts.cumsum(0)]), call.previous[:candidates],
        call.lengths[:candidates] + counts, call.parents[:candidates], call.siblings[:candidates],
        call.cu_candidates, call.width, call.mean, call.dedup, call.max_candidates, call.max_width,
    )  # fmt: skip
    out.token_scores[own] = token_scores
    out.scores[:candidates] = scores
    out.counts[:candidates] = counts
    out.kept.copy_(kept)
    out.parents.copy_(parents)
    at = (broken >= 0).nonzero()[:, 0]
    out.broken.fill_(-1)[at] = own[broken[at].long()]
    bad = own[~call.logprobs[own].isfinite()]
    first = torch.full_like(counts, num_tokens).scatter_reduce(0, owner[bad], bad, "amin")
    out.broken_base[:candidates] = torch.where(first < num_tokens, first, -1)
    return packed


def _indices(counts: Tensor, total: int) -> Tensor:
    """[2, 0, 1] -> [0, 0, 2]."""
    index = torch.arange(len(counts), device=counts.device)
    return torch.repeat_interleave(index, counts, output_size=total)


def _fake(*arguments: Any) -> Tensor:
    call = _Call(*arguments)
    return call.tokens.new_empty(sum(_sizes(*call.size)))


def _triton(*arguments: Any) -> Tensor:
    call = _Call(*arguments)
    if call.max_candidates > MAX_CANDIDATES:
        return _torch(*arguments)
    packed = _fake(*arguments)
    out = ScoreSelection.unpack(packed, *call.size)
    rounds, _, num_tokens, _ = call.size
    for guide, (tuned, untuned) in enumerate(zip(call.models[::2], call.models[1::2])):
        if num_tokens:
            add_guide[(num_tokens,)](
                *tuned, *untuned, call.weights, call.tokens, call.logprobs, out.tokens,
                out.logprobs, out.token_scores, tuned.largest.shape[1], untuned.largest.shape[1],
                guide, BLOCK=MERGE_BLOCK, **MERGE_OPTIONS,
            )  # fmt: skip
    if rounds:
        # Scratch that one program writes and all of its threads read.
        hashes, values = torch.empty_like(call.siblings), torch.empty_like(call.previous)
        choose_round[(rounds,)](
            call.tokens, call.logprobs, call.cu_tokens, call.previous, call.lengths, call.parents,
            call.siblings, call.cu_candidates, call.stops, call.cu_stops, call.width, call.mean,
            call.dedup, hashes, values, out.kept, out.parents, out.scores, out.counts, out.broken,
            out.broken_base, out.token_scores, call.max_width,
            **launch_options(call.max_candidates, call.max_width),
            enable_fp_fusion=False,  # the same roundings as torch's
        )  # fmt: skip
    return packed


_operator = register(
    "score_select(Tensor tokens, Tensor[] largest, Tensor[] total, Tensor[] target,"
    " Tensor weights, Tensor logprobs, Tensor cu_tokens, Tensor previous, Tensor lengths,"
    " Tensor parents, Tensor siblings, Tensor cu_candidates, Tensor stops, Tensor cu_stops,"
    " Tensor width, Tensor mean, Tensor dedup, int max_candidates, int max_width) -> Tensor",
    torch_path=_torch,
    triton_path=_triton,
    fake=_fake,
)
