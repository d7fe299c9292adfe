"""From last hidden states to logits: a model's LM head, and the scaling some models add."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from w2s_fast.kernels.linear_logprob_partials import Partials, linear_logprob_partials
from w2s_fast.kernels.token_logprob import token_logprob
from w2s_fast.models.body import refuse


class LMHead:
    """From last hidden states to logits: the model's LM head, and the scaling some models add."""

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        untyped: Any = model
        module = untyped.get_output_embeddings()
        if module is None:
            raise refuse(model, name, "it has no LM head")
        config = model.config.get_text_config()
        self.module: nn.Module = module
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        # Cohere multiplies its logits, Granite divides them.
        self.scale = float(getattr(config, "logit_scale", None) or 1.0)
        self.scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        self.forbidden: Tensor | None = None  # bool [V]

    def logits(self, hidden: Tensor, own: bool = False) -> Tensor:
        logits = self._own_logits(hidden)
        if self.forbidden is not None and not own:
            # Behind the soft cap, which would make -inf finite; and whatever stood there.
            logits = logits.masked_fill(self.forbidden, -torch.inf)
        return logits

    def _own_logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.module(hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def token_partials(self, hidden: Tensor, tokens: Tensor, vocab_size: int | None) -> Partials:
        if type(self.module) is nn.Linear and self.forbidden is None:
            return linear_logprob_partials(
                hidden,
                self.module.weight,
                tokens,
                self.module.bias,
                softcap=self.softcap,
                scale=self.scale,
                vocab_size=vocab_size,
            )
        # A quantised head computes its own product, and the fused one knows of no forbidden ids:
        # a few rows at a time.
        blocks = [
            token_logprob(self.logits(h), t, vocab_size=vocab_size)
            for h, t in zip(torch.split(hidden, 64), torch.split(tokens, 64))
        ]
        none = hidden.new_zeros(0, dtype=torch.float32)
        return Partials.of_logprobs(torch.cat(blocks) if blocks else none)
