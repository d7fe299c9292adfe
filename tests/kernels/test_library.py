"""Which implementation serves an operator is decided once, and Triton is never required."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCORE = """
import torch
from w2s_fast.kernels.linear_logprob import linear_logprob
got = linear_logprob(torch.ones(2, 4), torch.ones(8, 4), torch.tensor([0, 7]))
torch.testing.assert_close(got, -torch.full((2,), 8.0).log())
"""


def run(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_without_triton_the_operators_work() -> None:
    done = run(f"import sys; sys.modules['triton'] = None\n{SCORE}")
    assert done.returncode == 0, done.stderr


def test_the_interpreter_without_triton_is_an_error() -> None:
    done = run(f"import sys; sys.modules['triton'] = None\n{SCORE}", W2S_FAST_BACKEND="interpret")
    assert done.returncode != 0 and "ImportError" in done.stderr.replace("ModuleNotFound", "Import")


def test_the_interpreter_cannot_be_chosen_after_triton_was_imported() -> None:
    pytest.importorskip("triton", reason="Triton is not installed: pip install 'w2s-fast[test]'")
    done = run(f"import triton\n{SCORE}", W2S_FAST_BACKEND="interpret")
    assert "has to be set before triton is imported" in done.stderr


def test_a_backend_that_does_not_exist_is_named() -> None:
    done = run(SCORE, W2S_FAST_BACKEND="cuda")
    assert "'cuda'; allowed: auto, torch, interpret" in done.stderr
