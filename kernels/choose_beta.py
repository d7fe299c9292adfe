"""The weight of dynamic logit fusion (arXiv 2406.15480), chosen anew for every token."""

from __future__ import annotations

import torch
from torch import Tensor

from w2s_fast.kernels.fuse_logits import difference, logit_difference, rows_contiguous
from w2s_fast.kernels.library import constexpr, jit, register, tl, triton

GRID = 21  # beta is one of 0, 0.1, ..., 2
_PAIR = constexpr(21)  # columns after the grid: logsumexp of the guide's own untuned and tuned
_COLUMNS = constexpr(32)


def choose_beta(base: Tensor, tuned: Tensor, untuned: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The beta of dynamic logit fusion for every row, and the one guide it is for.

    With d = tuned - untuned, P_a = softmax(base + a d), Q_a = softmax(untuned + a d), it is the
    (guide, a) of least

        ( KL(P_a||P_0) - KL(Q_1||Q_0) )^2 + ( KL(P_0||P_a) - KL(Q_0||Q_1) )^2,   a = 0, 0.1, ..., 2

    the first guide, and the smallest a, at a tie. With F(a) = logsumexp(base + a d),
    KL(P_a||P_0) = a F'(a) - F(a) + F(0) and KL(P_0||P_a) = F(a) - F(0) - a F'(0); F' is the mean
    of d under P_a. The same identities hold for Q. So sums of e and d e are all it takes.

    Args:
        base: [S, V] of any float dtype.
        tuned, untuned: [G, S, V] of any float dtype.

    Returns:
        beta float32 [G, S], 0 for guides that are not active; active int64 [S]; objective float32
        [S]. Where logits are broken (NaN, +inf, nothing but -inf) the row's betas and objective
        are NaN, and so is all that is made from them.
    """
    chosen: tuple[Tensor, Tensor, Tensor] = _operator(base, tuned, untuned)
    return chosen


def _torch(base: Tensor, tuned: Tensor, untuned: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    sums = [_sums_torch(base.float(), t.float(), u.float()) for t, u in zip(tuned, untuned)]
    logs, means = (torch.stack(parts).double() for parts in zip(*sums))  # [G, S, GRID + 2]
    return _choose_from(logs, means)


def _sums_torch(base: Tensor, tuned: Tensor, untuned: Tensor) -> tuple[Tensor, Tensor]:
    """log sum e and sum(d e) / sum e, [S, GRID + 2]: over the grid of base, then untuned, tuned."""
    d = logit_difference(tuned, untuned)
    logs, means = [], []
    shifted = [base + (i / 10) * d for i in range(GRID)]
    for logits in (*shifted, untuned, tuned):
        log = logits.logsumexp(-1)
        logs.append(log)
        means.append(((logits - log[:, None]).exp() * d.where(logits > -torch.inf, 0.0)).sum(-1))
    return torch.stack(logs, -1), torch.stack(means, -1)


def _choose_from(logs: Tensor, means: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a = torch.arange(GRID, device=logs.device) / 10
    f, f0 = logs[..., :GRID], logs[..., :1]
    g0, g1 = logs[..., GRID, None], logs[..., GRID + 1, None]
    forward = a * means[..., :GRID] - f + f0
    backward = f - f0 - a * means[..., :1]
    forward_target = means[..., GRID + 1, None] - g1 + g0
    backward_target = g1 - g0 - means[..., GRID, None]
    objective = (forward - forward_target) ** 2 + (backward - backward_target) ** 2

    rows = objective.transpose(0, 1).flatten(1)  # [S, G * GRID], guides first
    best, where = rows.min(-1)
    active = where // GRID
    broken = ~rows.isfinite().all(-1)
    beta = torch.zeros(logs.shape[:2], device=logs.device)
    beta.scatter_(0, active[None], (where % GRID)[None] / 10)
    beta[:, broken] = torch.nan
    active = torch.where(broken, 0, active)
    return beta, active, torch.where(broken, torch.nan, best).float()


def _fake(base: Tensor, tuned: Tensor, untuned: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    guides, rows = tuned.shape[:2]
    return (
        base.new_empty((guides, rows), dtype=torch.float32),
        base.new_empty(rows, dtype=torch.int64),
        base.new_empty(rows, dtype=torch.float32),
    )


def _triton(
    base: Tensor, tuned: Tensor, untuned: Tensor, chunk: int = 4096, block: int = 256
) -> tuple[Tensor, Tensor, Tensor]:
    base, tuned, untuned = (rows_contiguous(x) for x in (base, tuned, untuned))
    rows, vocab = base.shape
    guides = len(tuned)
    chunks = triton.cdiv(vocab, chunk)
    beta, active, objective = _fake(base, tuned, untuned)
    partial = torch.empty((rows, guides, chunks, 3, 32), dtype=torch.float32, device=base.device)
    if rows:
        grid_sums[(rows * guides * chunks,)](
            base, base.stride(0), tuned, *tuned.stride()[:2], untuned, *untuned.stride()[:2],
            partial, vocab, guides, chunks, CHUNK=chunk, BLOCK=block,
            num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
        choose[(rows,)](
            partial, beta, active, objective, rows, guides, chunks,
            CHUNKS=triton.next_power_of_2(chunks), maxnreg=96, enable_fp_fusion=True,
        )  # fmt: skip
    return beta, active, objective


@jit(do_not_specialize=["guides"])
def grid_sums(
    base, base_row, tuned, tuned_guide, tuned_row, untuned, untuned_guide, untuned_row,
    partial, vocab, guides, chunks, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """max, sum e and sum d e of one chunk of one row and guide, for every column at once.

    Columns 0..20 are the grid, 21 and 22 the guide's untuned and tuned logits. They are held as
    16 + 8 columns, which wastes less than a power of two would.
    """
    program = tl.program_id(0)
    chunk = program % chunks
    guide = ((program // chunks) % guides).to(tl.int64)
    row = (program // chunks // guides).to(tl.int64)
    base += row * base_row
    tuned += guide * tuned_guide + row * tuned_row
    untuned += guide * untuned_guide + row * untuned_row

    low = tl.arange(0, 16)
    high = 16 + tl.arange(0, 8)
    a_low = tl.div_rn(low.to(tl.float32), 10.0)
    a_high = tl.div_rn(high.to(tl.float32), 10.0)
    a_high = tl.where(high < _PAIR, a_high, tl.where(high == _PAIR, 0.0, 1.0))
    own = (high >= _PAIR)[:, None]
    max_low = tl.full((16,), -float("inf"), tl.float32)
    max_high = tl.full((8,), -float("inf"), tl.float32)
    sum_low, slope_low = tl.zeros((16,), tl.float32), tl.zeros((16,), tl.float32)
    sum_high, slope_high = tl.zeros((8,), tl.float32), tl.zeros((8,), tl.float32)
    for first in range(0, CHUNK, BLOCK):
        v = chunk * CHUNK + first + tl.arange(0, BLOCK)
        b = tl.load(base + v, mask=v < vocab, other=-float("inf")).to(tl.float32)
        t = tl.load(tuned + v, mask=v < vocab, other=-float("inf")).to(tl.float32)
        u = tl.load(untuned + v, mask=v < vocab, other=-float("inf")).to(tl.float32)
        d = difference(t, u)
        max_low, sum_low, slope_low = accumulate(
            max_low, sum_low, slope_low, b[None, :] + a_low[:, None] * d[None, :], d
        )
        x = tl.where(own, u[None, :], b[None, :]) + a_high[:, None] * d[None, :]
        max_high, sum_high, slope_high = accumulate(max_high, sum_high, slope_high, x, d)
    out = partial + program.to(tl.int64) * 3 * _COLUMNS
    tl.store(out + low, max_low)
    tl.store(out + _COLUMNS + low, sum_low)
    tl.store(out + 2 * _COLUMNS + low, slope_low)
    tl.store(out + high, max_high)
    tl.store(out + _COLUMNS + high, sum_high)
    tl.store(out + 2 * _COLUMNS + high, slope_high)


@jit
def accumulate(largest, total, slope, x, d):
    """Adds a tile [columns, tokens] to running max, sum exp(x - max) and sum d exp(x - max)."""
    new = tl.maximum(largest, tl.max(x, 1))
    shift = tl.where(new == -float("inf"), 0.0, new)
    e = tl.exp(x - shift[:, None])
    old = tl.exp(largest - shift)
    # A token of no probability adds nothing, however different the guides find it.
    de = tl.where(x == -float("inf"), 0.0, e * d[None, :])
    return new, total * old + tl.sum(e, 1), slope * old + tl.sum(de, 1)


@jit(do_not_specialize=["beta", "active", "objective", "rows", "guides"])
def choose(partial, beta, active, objective, rows, guides, chunks, CHUNKS: tl.constexpr):
    """Merges the chunks of a row in a fixed order, and finds the best guide and weight."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, _COLUMNS)
    chunk = tl.arange(0, CHUNKS)
    a = column.to(tl.float64) / 10.0
    best = tl.full((), float("inf"), tl.float64)
    best_index = tl.zeros((), tl.int32)  # guide * 32 + column
    broken = tl.zeros((), tl.int32)
    for guide in range(guides):
        at = partial + (row * guides + guide) * chunks * 3 * _COLUMNS
        at += chunk[:, None] * 3 * _COLUMNS + column[None, :]
        inside = (chunk < chunks)[:, None] & (column <= _PAIR + 1)[None, :]
        maxima = tl.load(at, mask=inside, other=-float("inf"))
        largest = tl.max(maxima, 0)
        shift = tl.where(largest == -float("inf"), 0.0, largest)
        scale = tl.exp(maxima - shift[None, :])
        total = tl.sum(tl.load(at + _COLUMNS, mask=inside, other=0.0) * scale, 0)
        slope = tl.sum(tl.load(at + 2 * _COLUMNS, mask=inside, other=0.0) * scale, 0)
        total = tl.where(column <= _PAIR + 1, total, 1.0).to(tl.float64)
        f = shift.to(tl.float64) + tl.log(total)  # -inf where nothing is allowed: broken
        mean = slope.to(tl.float64) / total

        f0, mean0 = pick(f, column, 0), pick(mean, column, 0)
        g0, g1 = pick(f, column, _PAIR), pick(f, column, _PAIR + 1)
        forward = a * mean - f + f0 - (pick(mean, column, _PAIR + 1) - g1 + g0)
        backward = f - f0 - a * mean0 - (g1 - g0 - pick(mean, column, _PAIR))
        loss = tl.where(column < _PAIR, forward * forward + backward * backward, float("inf"))
        finite = (loss > -float("inf")) & (loss < float("inf"))
        broken += tl.sum(((column < _PAIR) & (finite == 0)).to(tl.int32), 0)
        least = tl.min(loss, 0)
        index = guide * _COLUMNS + tl.min(tl.where(loss == least, column, _COLUMNS), 0)
        best_index = tl.where(least < best, index, best_index)
        best = tl.minimum(best, least)
    best_guide = best_index // _COLUMNS
    chosen = tl.div_rn((best_index % _COLUMNS).to(tl.float32), 10.0)
    for guide in range(guides):
        value = tl.where(guide == best_guide, chosen, 0.0)
        tl.store(beta + guide * rows + row, tl.where(broken > 0, float("nan"), value))
    tl.store(active + row, tl.where(broken > 0, 0, best_guide).to(tl.int64))
    tl.store(objective + row, tl.where(broken > 0, float("nan"), best).to(tl.float32))


@jit
def pick(values, column, which):
    return tl.sum(tl.where(column == which, values, 0.0), 0)


_operator = register(
    "choose_beta(Tensor base, Tensor tuned, Tensor untuned) -> (Tensor, Tensor, Tensor)",
    torch_path=_torch,
    triton_path=_triton,
    fake=_fake,
)
