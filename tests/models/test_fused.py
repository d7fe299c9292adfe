"""Modules that one kernel computes are told by their code, and compute what they did."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tests.models.test_forwards import Operators
from tests.support.tiny_models import tiny_model
from w2s_fast.models import fused
from w2s_fast.models.fused import fused_forward
from w2s_fast.models.model import PagedModel

# Norms and rotations of a layer, and a norm behind all of them. Phi-3 rotates a part of each head.
COUNTED = {
    "gpt2": (0, 0, 0),
    "llama": (2, 1, 1),
    "qwen3": (4, 1, 1),
    "mistral": (2, 1, 1),
    "gemma2": (4, 1, 1),
    "phi3": (2, 0, 1),
    "mixtral": (2, 1, 1),
}


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the operators are kernels; here they are plain torch."""
    monkeypatch.setattr(fused, "runs_triton", lambda _: True)


def hidden_of(model: PreTrainedModel) -> tuple[Tensor, list[str]]:
    """Of a pass over a text, and the operators in it."""
    paged = PagedModel(model, kv_cache_tokens=64)
    (slot,) = paged.pool.allocate(1)
    with Operators() as operators:
        hidden = paged.forward([slot], torch.arange(1, 10), [9])
    return hidden, operators.names


@pytest.mark.parametrize("family", COUNTED)
def test_families_compute_the_same_by_fewer_operators(
    family: str, served: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family, layers=2, dtype=torch.float32)
    found, names = hidden_of(model)
    norms, rotations, behind = COUNTED[family]
    assert names.count("w2s_fast::rms_norm") == 2 * norms + behind
    assert names.count("w2s_fast::rotate") == 2 * rotations
    monkeypatch.setattr(fused, "runs_triton", lambda _: False)
    expected, names = hidden_of(model)
    assert "w2s_fast::rms_norm" not in names and "w2s_fast::rotate" not in names
    assert torch.equal(found, expected)


def test_where_no_kernel_runs_modules_keep_their_own() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    if fused.runs_triton(model.device):
        pytest.skip("kernels are interpreted")
    assert all(fused_forward(module) is None for module in model.modules())


def test_float64_is_left_to_transformers(served: None) -> None:
    _, names = hidden_of(tiny_model("llama"))
    assert not any(name.startswith("w2s_fast::r") for name in names)


def test_other_code_is_not_taken_for_the_same(served: None) -> None:
    class Centred(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))

    assert fused_forward(LlamaRMSNorm(4)) is not None
    assert fused_forward(Centred(4)) is None
    assert fused_forward(nn.RMSNorm(4)) is None


def test_other_rotations_are_not_taken_for_the_same(
    served: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interleaved(x: Tensor) -> Tensor:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)

    attention = tiny_model("mistral", layers=1).base_model.layers[0].self_attn
    assert fused_forward(attention) is not None
    rotary: Any = type(attention).forward.__globals__["apply_rotary_pos_emb"]
    monkeypatch.setitem(rotary.__globals__, "rotate_half", interleaved)
    fused._fused.cache_clear()
    try:
        assert fused_forward(attention) is None
    finally:
        fused._fused.cache_clear()


def test_inductor_gets_what_it_can_fuse(served: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gemma2", layers=1, dtype=torch.float32)
    expected, _ = hidden_of(model)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    found, names = hidden_of(model)
    assert not any(name.startswith("w2s_fast::r") for name in names)
    assert torch.equal(found, expected)
