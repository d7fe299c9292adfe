"""Logits are those of the model's own head, whatever computes the product."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.support.tiny_models import VOCABULARY, tiny_model
from w2s_fast.models.model import PagedModel


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_logits_of_any_rows_are_those_of_the_head(
    family: str, biased: bool, dtype: torch.dtype
) -> None:
    model = copy.deepcopy(tiny_model(family, dtype=dtype))
    if biased:
        model.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, VOCABULARY, dtype=dtype))
    head = PagedModel(model, kv_cache_tokens=256).head
    for rows in (0, 1, 4, 33):
        # Every second row, as where others are not asked for.
        hidden = torch.randn(2 * rows, 16, generator=torch.Generator().manual_seed(rows))
        hidden = hidden.to(dtype)[::2]
        logits = head.logits(hidden)
        assert logits.shape == (rows, VOCABULARY)
        assert logits.dtype is dtype
        torch.testing.assert_close(logits, model.lm_head(hidden).detach())


def test_who_hooks_into_the_head_is_heard() -> None:
    model = copy.deepcopy(tiny_model("llama", dtype=torch.float32))
    head = PagedModel(model, kv_cache_tokens=256).head
    hidden = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    expected = head.logits(hidden)
    with model.lm_head.register_forward_hook(lambda _module, _args, out: out + 1):
        torch.testing.assert_close(head.logits(hidden), expected + 1)
    torch.testing.assert_close(head.logits(hidden), expected)
