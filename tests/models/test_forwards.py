"""Forwards by faster operators compute what the modules do."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from w2s_fast.models.forwards import forward_of
from w2s_fast.models.model import PagedModel

ONEDNN = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN here")


class Operators(TorchDispatchMode):
    """Notes the names of all that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def gpt2(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=61, n_embd=512, n_layer=1, n_head=4, n_positions=64)
    return GPT2LMHeadModel(config).to(dtype).eval()


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=512, intermediate_size=1024, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def hidden_of(model: PagedModel, rows: int) -> tuple[Tensor, int]:
    """Of a pass over ``rows`` tokens of a text; with the products of oneDNN in it."""
    (slot,) = model.pool.allocate(1)
    try:
        with Operators() as operators:
            hidden = model.forward([slot], torch.arange(rows) % 61, [rows])
        return hidden, operators.names.count("mkldnn::_linear_pointwise")
    finally:
        model.pool.release([slot])


def own_hidden(model: PreTrainedModel, rows: int) -> Tensor:
    with torch.inference_mode():
        hidden: Tensor = model.base_model(torch.arange(rows)[None] % 61).last_hidden_state
    return hidden[0]


@ONEDNN
@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize(("rows", "products"), [(1, 3), (5, 3), (32, 3), (33, 0)])
def test_large_weights_of_few_rows_go_to_onednn(make: Any, rows: int, products: int) -> None:
    """Three of a layer have 2**19 weights: GPT-2's qkv and MLP, Llama's MLP."""
    model = make()
    hidden, counted = hidden_of(PagedModel(model, kv_cache_tokens=256), rows)
    assert counted == products
    torch.testing.assert_close(hidden, own_hidden(model, rows), atol=1e-4, rtol=1e-4)


@ONEDNN
def test_other_dtypes_are_left_to_torch() -> None:
    model = gpt2(torch.float64)
    hidden, counted = hidden_of(PagedModel(model, kv_cache_tokens=256), 4)
    assert counted == 0
    torch.testing.assert_close(hidden, own_hidden(model, 4))


@ONEDNN
def test_hooks_replaced_forwards_and_other_weights_are_followed() -> None:
    model = gpt2()
    paged = PagedModel(model, kv_cache_tokens=256)
    before, _ = hidden_of(paged, 4)
    mlp: Any = model.base_model.h[0].mlp

    with mlp.c_fc.register_forward_hook(lambda _module, _args, out: out + 1):
        hooked, counted = hidden_of(paged, 4)
        assert counted == 3
        torch.testing.assert_close(hooked, own_hidden(model, 4), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(hooked, before, atol=1e-2)

    with torch.no_grad():
        mlp.c_fc.bias.add_(1.0)
    paged.follow()
    torch.testing.assert_close(hidden_of(paged, 4)[0], hooked, atol=1e-4, rtol=1e-4)

    mlp.c_fc.weight = nn.Parameter(2 * mlp.c_fc.weight.detach())
    paged.follow()
    doubled, counted = hidden_of(paged, 4)
    assert counted == 3
    torch.testing.assert_close(doubled, own_hidden(model, 4), atol=1e-4, rtol=1e-4)

    mlp.c_proj.forward = MethodType(lambda own, hidden: 0 * Conv1D.forward(own, hidden), mlp.c_proj)
    paged.follow()
    replaced, counted = hidden_of(paged, 4)
    assert counted == 2
    torch.testing.assert_close(replaced, own_hidden(model, 4), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gelu_is_one_operator(dtype: torch.dtype) -> None:
    hidden = torch.linspace(-9, 9, 1001, dtype=dtype)[None]
    module = NewGELUActivation()
    forward = forward_of(module)
    assert forward is not None
    with Operators() as operators:
        out = forward(module, hidden)
    assert operators.names == ["aten::gelu"]
    expected = module(hidden.double()).to(dtype)
    torch.testing.assert_close(out, expected)
