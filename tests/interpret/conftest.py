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
    prepared already: that took half the time of these tests."""
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    @functools.cache
    def builtins_of(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    prepare = interpreter._patch_builtin

    def prepare_once(package: Any, *rest: Any) -> None:
        names = builtins_of(package)
        if not names or is_builtin(getattr(package, names[0])):
            prepare(package, *rest)

    interpreter._patch_builtin = prepare_once


if BACKEND == "interpret":
    _quicken_the_interpreter()


def pytest_configure(config: pytest.Config) -> None:
    """The interpreter computes with numpy, which warns of what kernels do on purpose: log 0."""
    for module in ("triton.runtime.interpreter", "numpy"):
        config.addinivalue_line("filterwarnings", f"ignore::RuntimeWarning:{module}")
