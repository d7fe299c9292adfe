"""Kernels against float64: in Triton's interpreter, or on the GPU where there is one.

The interpreter has to be chosen before Triton is imported, so these files run in a session of
their own, which tests/kernels/test_interpreter.py starts. One file an operator:
test_<operator>.py.
"""

import functools
from pathlib import Path

import pytest


@functools.cache
def runs_kernels() -> bool:
    """Whether anything does here, and it is ready. Takes long: asked where files are collected."""
    import torch

    from tests.interpret.quick import quicken
    from w2s_fast.kernels.library import BACKEND

    if BACKEND == "interpret":
        quicken()
    return BACKEND == "interpret" or (BACKEND == "auto" and torch.cuda.is_available())


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    return True if collection_path.suffix == ".py" and not runs_kernels() else None


def pytest_configure(config: pytest.Config) -> None:
    """The interpreter computes with numpy, which warns of what kernels do on purpose: log 0."""
    for module in ("triton.runtime.interpreter", "numpy"):
        config.addinivalue_line("filterwarnings", f"ignore::RuntimeWarning:{module}")
