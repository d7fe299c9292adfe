"""Modules that Triton kernels compute in one launch: RMSNorm, and rotary embeddings in attention.

Which classes these are is told by their code, not by their names: most families of transformers
have a class of their own that reads like Llama's or Gemma's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gemma2 import modeling_gemma2 as gemma
from transformers.models.llama import modeling_llama as llama

from w2s_fast.kernels.library import runs_triton
from w2s_fast.kernels.rms_norm import rms_norm
from w2s_fast.kernels.rotate import rotate

_ROTARY = "apply_rotary_pos_emb"


def fused_forward(module: nn.Module) -> Callable[..., Any] | None:
    """What a twin of this module is to be run by; None: its class's own forward."""
    kind: Any = type(module)
    forward = _fused(kind)
    if forward is None:
        return None
    weight = next(module.parameters(), None)
    return forward if weight is not None and runs_triton(weight.device) else None


@functools.cache
def _fused(kind: type[nn.Module]) -> Callable[..., Any] | None:
    own: Any = kind.forward
    if _alike(own, llama.LlamaRMSNorm.forward):
        return _llama_norm
    if _alike(own, gemma.Gemma2RMSNorm.forward) and _alike(
        getattr(kind, "_norm", None), gemma.Gemma2RMSNorm._norm
    ):
        return _gemma_norm
    if isinstance(own, FunctionType) and _ROTARY in own.__code__.co_names:
        rotary: Any = own.__globals__.get(_ROTARY)
        if _alike(rotary, llama.apply_rotary_pos_emb) and _alike(
            rotary.__globals__.get("rotate_half"), llama.rotate_half
        ):
            return _with_rotary(own)
    return None


def _alike(function: Any, other: Any) -> bool:
    """Whether two functions do the same, whatever their docstrings say."""
    if not (isinstance(function, FunctionType) and isinstance(other, FunctionType)):
        return False
    return _reading(function) == _reading(other)


def _reading(function: FunctionType) -> tuple[Any, ...]:
    code = function.__code__
    constants = [c for c in code.co_consts if c is not None and c != function.__doc__]
    return code.co_code, code.co_names, code.co_varnames, constants, function.__defaults__


def _llama_norm(module: Any, hidden_states: Tensor) -> Tensor:
    if _left_to_torch(hidden_states, module.weight):
        out: Tensor = type(module).forward(module, hidden_states)
        return out
    return rms_norm(hidden_states, module.weight, module.variance_epsilon)


def _gemma_norm(module: Any, x: Tensor) -> Tensor:
    if _left_to_torch(x, module.weight):
        out: Tensor = type(module).forward(module, x)
        return out
    return rms_norm(x, module.weight, module.eps, offset=True)


def _with_rotary(forward: FunctionType) -> Callable[..., Any]:
    """The same forward, where ``apply_rotary_pos_emb`` means the kernel."""
    fused = FunctionType(
        forward.__code__,
        {**forward.__globals__, _ROTARY: _rotary},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    fused.__kwdefaults__ = forward.__kwdefaults__
    return functools.update_wrapper(fused, forward)


def _rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    if _left_to_torch(q, k, cos, sin) or unsqueeze_dim != 1:
        turned: tuple[Tensor, Tensor] = llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)
        return turned
    return rotate(q, k, cos, sin)


def _left_to_torch(*tensors: Tensor) -> bool:
    """Kernels take one dtype; inductor fuses such operators by itself, with what is around them.

    What transformers does in float32 whatever it is given, an operator does in float64 if need be.
    """
    dtypes = {tensor.dtype for tensor in tensors}
    return torch.compiler.is_compiling() or len(dtypes) > 1 or torch.float64 in dtypes
