"""Kernels against float64: in Triton's interpreter, or on the GPU where there is one.

The interpreter has to be chosen before Triton is imported, so these files run in a session of
their own, which tests/kernels/test_interpreter.py starts. One file an operator:
test_<operator>.py.
"""

import functools
import inspect
from typing import Any

import pytest
import torch

from w2s_fast.kernels.library import BACKEND

runs_kernels = BACKEND == "interpret" or (BACKEND == "auto" and torch.cuda.is_available())
collect_ignore_glob = [] if runs_kernels else ["test_*.py"]


def _quicken_the_interpreter() -> None:
    """It looks through all of triton.language whenever one kernel calls another, for what it has
    prepared already, and makes a table of all types to look one up: half the time of these tests.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    @functools.cache
    def first_builtin(language: Any) -> str:
        return next(n for n, member in inspect.getmembers(language) if tl.core.is_builtin(member))

    @functools.cache
    def languages(kernel: Any) -> list[Any]:
        return [seen for seen in kernel.__globals__.values() if seen is tl or seen is tl.core]

    prepare = interpreter._patch_lang
    nothing_to_undo = getattr(interpreter, "_LangPatchScope", lambda: None)

    def prepare_once(kernel: Any) -> Any:
        if any(tl.core.is_builtin(getattr(x, first_builtin(x))) for x in languages(kernel)):
            return prepare(kernel)
        return nothing_to_undo()

    interpreter._patch_lang = prepare_once

    look_up = interpreter._get_np_dtype
    known = functools.cache(look_up)

    def numpy_type(dtype: Any) -> Any:
        return known(dtype) if type(dtype) is tl.core.dtype else look_up(dtype)

    interpreter._get_np_dtype = numpy_type


if BACKEND == "interpret":
    _quicken_the_interpreter()


def pytest_configure(config: pytest.Config) -> None:
    """The interpreter computes with numpy, which warns of what kernels do on purpose: log 0."""
    for module in ("triton.runtime.interpreter", "numpy"):
        config.addinivalue_line("filterwarnings", f"ignore::RuntimeWarning:{module}")
