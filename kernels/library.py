"""The operator library ``torch.ops.w2s_fast``: how an operator is registered, and what serves it.

Every operator has three implementations: Triton on CUDA (CUDA C++ for copies of pages), plain
torch on the CPU, and a fake one that only knows shapes, for torch.compile. Which one runs is
decided by the tensors' device alone, unless the environment says otherwise:

    W2S_FAST_BACKEND=auto        Triton on CUDA where it is installed, torch elsewhere (the default)
    W2S_FAST_BACKEND=torch       torch everywhere: the reference on any device
    W2S_FAST_BACKEND=interpret   Triton's interpreter on the CPU: what the tests prove kernels with

The interpreter has to be chosen before the first kernel is defined, so the variable is read once,
when this module is imported.

Launch parameters come from fixed tables by :class:`Gpu`, never from autotuning: a table entry is
compiled once and never depends on which batch came first.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

_BACKENDS = ("auto", "torch", "interpret")
BACKEND = os.environ.get("W2S_FAST_BACKEND", "auto")
if BACKEND not in _BACKENDS:
    raise ImportError(f"W2S_FAST_BACKEND is {BACKEND!r}; allowed: {', '.join(_BACKENDS)}")
if BACKEND == "interpret":
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise ImportError("W2S_FAST_BACKEND=interpret has to be set before triton is imported")
    os.environ["TRITON_INTERPRET"] = "1"

triton: Any = None
tl: Any = None
try:
    triton = import_module("triton")
    tl = import_module("triton.language")
except ImportError:  # the CPU needs none: kernels are then defined, but never run
    if BACKEND == "interpret":
        raise
HAS_TRITON = tl is not None


def jit(
    function: Callable[..., Any] | None = None, *, do_not_specialize: Sequence[str] = ()
) -> Any:
    """``triton.jit``; without Triton the function stays as it is, and nobody calls it.

    Args:
        do_not_specialize: integers that vary from call to call. Triton compiles anew for 1 and
            for multiples of 16 of any other integer.
    """
    if function is None:
        return lambda f: jit(f, do_not_specialize=do_not_specialize)
    if not HAS_TRITON:
        return function
    return triton.jit(function, do_not_specialize=list(do_not_specialize))


def constexpr(value: float) -> Any:
    """A module's constant that kernels may read."""
    return tl.constexpr(value) if HAS_TRITON else value


class Gpu(NamedTuple):
    """What launch tables depend on."""

    arch: int  # compute capability: 90 for 9.0
    sms: int


# What kernels are tuned for where there is no GPU: in the interpreter, and ahead of time.
STAND_IN = Gpu(arch=90, sms=132)
_gpus: dict[torch.device, Gpu] = {}


def gpu(device: torch.device) -> Gpu:
    """The GPU behind a CUDA device; ``STAND_IN`` for any other device."""
    if device.type != "cuda":
        return STAND_IN
    if device not in _gpus:
        properties = torch.cuda.get_device_properties(device)
        arch = 10 * properties.major + properties.minor
        _gpus[device] = Gpu(arch, properties.multi_processor_count)
    return _gpus[device]


def runs_triton(device: torch.device) -> bool:
    """Whether the operators launch Triton kernels for tensors on this device."""
    return BACKEND == "interpret" or (device.type == "cuda" and BACKEND == "auto" and HAS_TRITON)


_LIBRARY = torch.library.Library("w2s_fast", "FRAGMENT")


def register(
    schema: str,
    *,
    torch_path: Callable[..., Any],
    triton_path: Callable[..., Any] | None = None,
    cuda_path: Callable[..., Any] | None = None,
    fake: Callable[..., Any],
) -> Callable[..., Any]:
    """Define ``torch.ops.w2s_fast.<name>`` and return it.

    Args:
        schema: ``name(Tensor x, ...) -> ...``, as torch.library writes it.
        torch_path: plain torch, for any device.
        triton_path: launches Triton kernels; same arguments, same results. The first argument's
            device is the current one while it runs.
        cuda_path: instead of it where the kernel is CUDA C++, which Triton is not needed for.
        fake: same arguments; returns empty tensors of the right shapes and dtypes.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    on_cuda = cuda_path or (triton_path if HAS_TRITON else None)
    if on_cuda is None or BACKEND == "torch":
        _LIBRARY.impl(name, torch_path, "CUDA")
    else:
        _LIBRARY.impl(name, _on_its_device(on_cuda), "CUDA")
    interpreted = triton_path if BACKEND == "interpret" else None
    _LIBRARY.impl(name, interpreted or torch_path, "CPU")
    torch.library.register_fake(f"w2s_fast::{name}", fake, lib=_LIBRARY)
    overload: Callable[..., Any] = getattr(torch.ops.w2s_fast, name).default
    return overload


def _on_its_device(path: Callable[..., Any]) -> Callable[..., Any]:
    """Kernels are launched on the current device, wherever the tensors are."""

    @wraps(path)
    def on_its_device(first: Tensor, *rest: Any) -> Any:
        if first.device.index == torch.cuda.current_device():
            return path(first, *rest)  # a device guard costs more than this question
        with torch.cuda.device(first.device):
            return path(first, *rest)

    return on_its_device
