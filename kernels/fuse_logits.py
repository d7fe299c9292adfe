"""Token-level fusion: the base's logits plus weighted differences of the guides' logits.

That is emulated fine-tuning (arXiv 2310.12962) and proxy-tuning (arXiv 2401.08565).

A guide's difference tuned - untuned is 0 where both are -inf: ids that a model pads with, or
forbids, say nothing about the base. A token whose base logit is -inf stays -inf.
"""

from __future__ import annotations

import torch
from torch import Tensor

from w2s_fast.kernels.library import jit, register, tl, triton


def fuse_logits(base: Tensor, tuned: Tensor, untuned: Tensor, beta: Tensor) -> Tensor:
    """base + sum over g of beta_g * (tuned_g - untuned_g), in float32.

    Args:
        base: [S, V] of any float dtype.
        tuned, untuned: [G, S, V] of any float dtype.
        beta: float32 [G, S]. A guide is not read where its beta is 0.

    Returns:
        float32 [S, V]; NaN where an input or a beta is.
    """
    fused: Tensor = _operator(base, tuned, untuned, beta)
    return fused


def logit_difference(tuned: Tensor, untuned: Tensor) -> Tensor:
    tuned, untuned = tuned.float(), untuned.float()
    return torch.where((tuned == untuned) & tuned.isneginf(), 0.0, tuned - untuned)


def _torch(base: Tensor, tuned: Tensor, untuned: Tensor, beta: Tensor) -> Tensor:
    fused = base.float()
    for guide in range(len(beta)):
        shift = logit_difference(tuned[guide], untuned[guide]) * beta[guide, :, None]
        fused = fused + torch.where(beta[guide, :, None] == 0, 0.0, shift)
    return torch.where(base.isneginf(), -torch.inf, fused)


def _fake(base: Tensor, tuned: Tensor, untuned: Tensor, beta: Tensor) -> Tensor:
    return base.new_empty(base.shape, dtype=torch.float32)


def rows_contiguous(logits: Tensor) -> Tensor:
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def _triton(
    base: Tensor, tuned: Tensor, untuned: Tensor, beta: Tensor, block: int = 2048
) -> Tensor:
    base, tuned, untuned = (rows_contiguous(x) for x in (base, tuned, untuned))
    rows, vocab = base.shape
    fused = torch.empty((rows, vocab), dtype=torch.float32, device=base.device)
    blocks = triton.cdiv(vocab, block)
    if rows:
        fuse[(rows * blocks,)](
            base, base.stride(0), tuned, *tuned.stride()[:2], untuned, *untuned.stride()[:2],
            beta, *beta.stride(), fused, vocab, blocks, len(beta), BLOCK=block,
            enable_fp_fusion=True,
        )  # fmt: skip
    return fused


@jit
def difference(tuned, untuned):
    return tl.where((tuned == untuned) & (tuned == -float("inf")), 0.0, tuned - untuned)


@jit(do_not_specialize=["beta", "beta_guide", "beta_row", "guides"])
def fuse(
    base, base_row, tuned, tuned_guide, tuned_row, untuned, untuned_guide, untuned_row,
    beta, beta_guide, beta_row, fused, vocab, blocks, guides, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one row."""
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    v = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = v < vocab
    b = tl.load(base + row * base_row + v, mask=inside).to(tl.float32)
    out = b
    tuned += row * tuned_row
    untuned += row * untuned_row
    for guide in range(guides):
        weight = tl.load(beta + guide * beta_guide + row * beta_row)
        if weight != 0:
            t = tl.load(tuned + v, mask=inside).to(tl.float32)
            u = tl.load(untuned + v, mask=inside).to(tl.float32)
            out += weight * difference(t, u)
        tuned += tuned_guide
        untuned += untuned_guide
    out = tl.where(b == -float("inf"), b, out)
    tl.store(fused + row * vocab + v, out, mask=inside)


_operator = register(
    "fuse_logits(Tensor base, Tensor tuned, Tensor untuned, Tensor beta) -> Tensor",
    torch_path=_torch,
    triton_path=_triton,
    fake=_fake,
)
