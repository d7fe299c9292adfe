"""Tokens drawn from the logits of several models at once: fused, warped and drawn.

    l = l_base + sum over guides g of  beta_g * (l_tuned_g - l_untuned_g)

That is emulated fine-tuning (arXiv 2310.12962) and proxy-tuning (arXiv 2401.08565); without an
untuned model the tuned one's log-probs are added (GenARM, arXiv 2410.08193), which differ from its
logits by a number that is the same for all tokens. In dynamic fusion (arXiv 2406.15480) the betas
are chosen anew for every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from w2s_fast.attention import Field, to_device
from w2s_fast.decoding.draws import Draw
from w2s_fast.decoding.sampling import SamplingBatch
from w2s_fast.kernels.choose_beta import choose_beta
from w2s_fast.kernels.fuse_logits import fuse_logits
from w2s_fast.kernels.token_logprob import token_logprob

# Of each guide the numbers of its tuned and its untuned model among those of a step: 0 is the base.
GuideRoles: TypeAlias = Sequence[tuple[int, int | None]]


def fusion_fields(rows: int, guides: int) -> dict[str, Field]:
    """The settings of ``rows`` rows as fields of a buffer, in the order of :class:`Fusion`."""
    return {
        "beta": Field(torch.float32, (rows, guides)),
        "plausibility": Field(torch.float32, (rows,), spare=-torch.inf),
        "dynamic": Field(torch.bool, (rows,)),
    }


class FusionColumns(NamedTuple):
    """The columns of a :class:`Fusion` on the host, where they are made; betas row after row."""

    beta: NDArray[np.float32]
    plausibility: NDArray[np.float32]
    dynamic: NDArray[np.bool_]

    @property
    def some_plausible(self) -> bool:
        return bool((self.plausibility > -np.inf).any())

    @property
    def some_dynamic(self) -> bool:
        return bool(self.dynamic.any())

    def to(self, device: torch.device) -> Fusion:
        """On a device, in one copy."""
        there = to_device(self._asdict(), device)
        return Fusion(
            beta=there["beta"].view(len(self.dynamic), -1),
            plausibility=there["plausibility"],
            dynamic=there["dynamic"],
            some_plausible=self.some_plausible,
            some_dynamic=self.some_dynamic,
        )


class Fusion(NamedTuple):
    """How logits of S rows are fused.

    Attributes:
        beta: float32 [S, G], of rows that choose none.
        plausibility: float32 [S], log of the share of the likeliest token's probability under the
            base that others need; -inf: none.
        dynamic: bool [S], whether betas are chosen.
        some_plausible, some_dynamic: whether there can be such rows.
    """

    beta: Tensor
    plausibility: Tensor
    dynamic: Tensor
    some_plausible: bool
    some_dynamic: bool

    def first(self, rows: int) -> Fusion:
        """Of the first rows: views."""
        return self._replace(
            beta=self.beta[:rows],
            plausibility=self.plausibility[:rows],
            dynamic=self.dynamic[:rows],
        )

    def draw(
        self, logits: Sequence[Tensor], guides: GuideRoles, sampling: SamplingBatch
    ) -> tuple[Draw, Tensor]:
        """Draw a token for each row.

        Args:
            logits: of each model [S, V], the base first.

        Returns:
            What was drawn, with the base's log-probs, +inf where only the fused logits are broken;
            and the other models' log-probs of it, float32 [M - 1, S].
        """
        tokens, fused = sampling.draw(self.mix(logits, guides))
        logprobs = torch.stack([token_logprob(own, tokens) for own in logits])
        base = logprobs[0]
        # Where only their sum is broken, it has to be seen by other means than the base's NaN.
        broken = fused.isfinite().logical_not_() & base.isfinite()
        return Draw(tokens, base.masked_fill(broken, torch.inf)), logprobs[1:]

    def mix(self, logits: Sequence[Tensor], guides: GuideRoles) -> Tensor:
        """The fused logits, float32 [S, V]."""
        base = logits[0]
        pairs = [(logits[tuned], _of_untuned(logits, untuned)) for tuned, untuned in guides]
        beta = self.beta.t()
        if self.some_dynamic:
            tuned, untuned = (torch.stack(own) for own in zip(*pairs))
            chosen, _, _ = choose_beta(base, tuned, untuned)
            beta = torch.where(self.dynamic, chosen, beta)
        fused = base.float()
        if self.some_plausible:
            least = fused.amax(-1) + self.plausibility
            fused = fused.masked_fill(fused < least[:, None], -torch.inf)
        for g, (tuned, untuned) in enumerate(pairs):
            fused = fuse_logits(fused, tuned[None], untuned[None], beta[g : g + 1])
        return fused


def _of_untuned(logits: Sequence[Tensor], untuned: int | None) -> Tensor:
    if untuned is None:
        return logits[0].new_zeros(1, 1).expand(logits[0].shape)
    return logits[untuned]
