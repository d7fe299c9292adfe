"""From last hidden states to logits: a model's LM head, and the scaling some models add."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from w2s_fast.kernels.linear_logprob_partials import Partials, linear_logprob_partials
from w2s_fast.kernels.token_logprob import token_logprob
from w2s_fast.models.body import refuse
from w2s_fast.models.forwards import goes_to_onednn, is_dense, onednn
from w2s_fast.models.inference import inference

# Rows of logits that begin anywhere, as those of GPT-2's 50,257 ids, are written and read by single
# elements.
_MULTIPLE = 64


def pads_heads(device: torch.device) -> bool:
    """Whether the head of an odd vocabulary is worth a padded copy on this device."""
    return device.type == "cuda"


class LMHead:
    """From last hidden states to logits: the model's LM head, and the scaling some models add.

    Attributes:
        module: the model's head. A plain linear one of an odd vocabulary has a copy on CUDA whose
            rows are padded with zeros: see :meth:`follow`.
    """

    def __init__(self, model: PreTrainedModel, name: str, instead: nn.Module | None = None) -> None:
        """``instead``: what runs in the place of the model's own head; or None."""
        untyped: Any = model
        module = untyped.get_output_embeddings() if instead is None else instead
        if module is None:
            raise refuse(model, name, "it has no LM head")
        config = model.config.get_text_config()
        self.module: nn.Module = module
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        # Cohere multiplies its logits, Granite divides them.
        self.scale = float(getattr(config, "logit_scale", None) or 1.0)
        self.scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        self._forbidden: Tensor | None = None  # bool [V], or as wide as the padded head
        self._padded: nn.Linear | None = None
        if _is_dense_linear(module) and pads_heads(module.weight.device):
            self._padded = _padded(module)
            self.follow()

    @property
    def padded_bytes(self) -> int:
        """Memory of the padded copy."""
        return 0 if self._padded is None else sum(p.nbytes for p in self._padded.parameters())

    @inference
    def follow(self) -> None:
        """Take over the values that the model's head has now. The padded copy, which recorded
        passes read, stays where it is."""
        if self._padded is not None:
            for name, value in self.module.named_parameters():
                getattr(self._padded, name)[: len(value)].copy_(value)

    def forbid(self, forbidden: Tensor) -> None:
        """bool [V]: these ids get no probability."""
        more = 0 if self._padded is None else self._padded.out_features - len(forbidden)
        self._forbidden = nn.functional.pad(forbidden, (0, more), value=True)

    def logits(self, hidden: Tensor, own: bool = False) -> Tensor:
        """[N, D] -> [N, V]; rows may lie at a larger pitch."""
        logits = self._own_logits(hidden)
        if self._forbidden is not None and not own:
            # Behind the soft cap, which would make -inf finite; and whatever stood there.
            logits = logits.masked_fill(self._forbidden[: logits.shape[-1]], -torch.inf)
        return logits if self._padded is None else logits[..., : self._vocab_size]

    def _own_logits(self, hidden: Tensor) -> Tensor:
        head = self.module
        if self._padded is not None and _is_plain(head):
            head = self._padded
        if type(head) is nn.Linear and _is_plain(head) and goes_to_onednn(hidden, head.weight):
            logits = onednn(hidden, head.weight, head.bias)
        else:
            logits = head(hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    @property
    def _vocab_size(self) -> int:
        assert isinstance(self.module, nn.Linear)
        return len(self.module.weight)

    def token_partials(self, hidden: Tensor, tokens: Tensor, vocab_size: int | None) -> Partials:
        if _is_dense_linear(self.module) and self._forbidden is None:
            head = self.module if self._padded is None else self._padded
            return linear_logprob_partials(
                hidden,
                head.weight,
                tokens,
                head.bias,
                softcap=self.softcap,
                scale=self.scale,
                vocab_size=min(vocab_size or self._vocab_size, self._vocab_size),
            )
        # A quantised head computes its own product, and the fused one knows of no forbidden ids:
        # a few rows at a time.
        blocks = [
            token_logprob(self.logits(h), t, vocab_size=vocab_size)
            for h, t in zip(torch.split(hidden, 64), torch.split(tokens, 64))
        ]
        none = hidden.new_zeros(0, dtype=torch.float32)
        return Partials.of_logprobs(torch.cat(blocks) if blocks else none)


def _padded(head: nn.Linear) -> nn.Linear | None:
    """A head of zeros, of as many rows as a multiple asks for; None if it has as many."""
    rows, width = head.weight.shape
    if rows % _MULTIPLE == 0:
        return None
    rows = -(-rows // _MULTIPLE) * _MULTIPLE
    # Made on no device: elsewhere it would draw from the caller's generator.
    padded = nn.Linear(width, rows, head.bias is not None, "meta", head.weight.dtype)
    padded = padded.requires_grad_(False).to_empty(device=head.weight.device)
    for parameter in padded.parameters():
        parameter.zero_()
    return padded


def _is_dense_linear(head: nn.Module) -> TypeGuard[nn.Linear]:
    return type(head) is nn.Linear and is_dense(head.weight)


def _is_plain(head: nn.Module) -> bool:
    """Whether nobody has hooked into the head, or replaced its forward."""
    hooked = head._forward_hooks or head._forward_pre_hooks
    return not hooked and "forward" not in vars(head)
