"""score_select on a GPU: a launch for each guide, one program a token, then one program a round.

The program of a round could merge its partials, too, and save a launch. But then one multiprocessor
reads them all while the others wait: for 16 chunks of 5 tokens and gpt2's 393 splits 0.5 MB, for 16
chunks of 30 tokens and 1,002 splits of 128,256 ids 7.7 MB.
"""

from __future__ import annotations

from w2s_fast.kernels.library import jit, tl
from w2s_fast.kernels.logsumexp import logprob_of_row
from w2s_fast.kernels.select_beams_triton import choose


# The host reads one buffer, and may have sent one: what lies in it begins anywhere. No variants for
# multiples of 16.
@jit(
    do_not_specialize=[
        "tuned_largest", "tuned_total", "tuned_target", "untuned_largest", "untuned_total",
        "untuned_target", "weights", "tokens", "logprobs", "out_tokens", "out_logprobs",
        "token_scores", "tuned_splits", "untuned_splits", "guide",
    ]
)  # fmt: skip
def add_guide(
    tuned_largest, tuned_total, tuned_target, untuned_largest, untuned_total, untuned_target,
    weights, tokens, logprobs, out_tokens, out_logprobs, token_scores,
    tuned_splits, untuned_splits, guide, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token a program: a guide's score of it is added, and what else the host reads copied."""
    t = tl.program_id(0)
    above = logprob_of_row(tuned_largest, tuned_total, tuned_target, t, tuned_splits, BLOCK)
    below = logprob_of_row(untuned_largest, untuned_total, untuned_target, t, untuned_splits, BLOCK)
    score = tl.load(token_scores + t, mask=guide > 0, other=0.0)
    score += tl.load(weights + guide) * (above.to(tl.float64) - below.to(tl.float64))
    tl.store(token_scores + t, score)
    if guide == 0:
        tl.store(out_tokens + t, tl.load(tokens + t))
        tl.store(out_logprobs + t, tl.load(logprobs + t).to(tl.float64))


@jit(
    do_not_specialize=[
        "tokens", "logprobs", "cu_tokens", "previous", "lengths", "parents", "siblings",
        "cu_candidates", "stops", "cu_stops", "width", "mean", "dedup", "kept_parents", "scores",
        "counts", "broken", "broken_base", "token_scores", "max_width",
    ]
)  # fmt: skip
def choose_round(
    tokens, logprobs, cu_tokens, previous, lengths, parents, siblings, cu_candidates,
    stops, cu_stops, width, mean, dedup, hashes, values,
    kept, kept_parents, scores, counts, broken, broken_base, token_scores, max_width,
    CANDIDATES: tl.constexpr, OTHERS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
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
    logprobs += origin
    token_scores += origin
    start = (tl.load(cu_tokens + c, mask=real, other=0) - origin).to(tl.int32)
    end = (tl.load(cu_tokens + c + 1, mask=real, other=0) - origin).to(tl.int32)
    drawn = tl.where(real, end - start, 0)

    # Up to and including the first token that ends a response.
    first_stop = tl.load(cu_stops + r)
    num_stops = (tl.load(cu_stops + r + 1) - first_stop).to(tl.int32)
    length = drawn
    for first in range(0, tl.max(drawn, 0), TOKENS):
        step = first + tl.arange(0, TOKENS)
        inside = step[None, :] < drawn[:, None]
        token = tl.load(tokens + start[:, None] + step[None, :], mask=inside, other=0)
        ends = tl.zeros([CANDIDATES, TOKENS], tl.int32)
        for e in range(num_stops):
            ends = tl.maximum(ends, (token == tl.load(stops + first_stop + e)).to(tl.int32))
        ended = tl.where(inside & (ends > 0), step[None, :] + 1, drawn[:, None])
        length = tl.minimum(length, tl.min(ended, 1))

    bad = length
    for first in range(0, tl.max(drawn, 0), TOKENS):
        step = first + tl.arange(0, TOKENS)
        t = start[:, None] + step[None, :]
        inside = step[None, :] < length[:, None]
        x = tl.load(logprobs + t, mask=inside, other=0.0)
        finite = tl.abs(x) < float("inf")  # False for NaN, too
        bad = tl.minimum(bad, tl.min(tl.where(finite, length[:, None], step[None, :]), 1))
        behind = (step[None, :] >= length[:, None]) & (step[None, :] < drawn[:, None])
        tl.store(token_scores + t, 0.0, mask=behind)
    tl.store(broken_base + c, tl.where(bad < length, origin + start + bad, -1), mask=real)
    choose(
        r, begin, count, origin, start, length, tokens, cu_tokens, previous, lengths, parents,
        siblings, width, mean, dedup, counts, hashes, values, token_scores, scores, kept,
        kept_parents, broken, max_width, True, CANDIDATES, OTHERS, TOKENS, WIDTH,
    )  # fmt: skip
