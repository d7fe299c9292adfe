"""Which implementation serves an operator is decided once, and Triton is never required."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
SCORE = """
import torch
from w2s_fast.kernels.linear_logprob import linear_logprob
got = linear_logprob(torch.ones(2, 4), torch.ones(8, 4), torch.tensor([0, 7]))
torch.testing.assert_close(got, -torch.full((2,), 8.0).log())
"""
WITHOUT_TRITON = f"import sys; sys.modules['triton'] = None\n{SCORE}"
AFTER_TRITON = f"import triton\n{SCORE}"
# Each in a child of its own of one process, which imports nothing but torch: that takes seconds.
CHILDREN = """
import json, os, sys, tempfile, traceback
import torch
assert "triton" not in sys.modules
done = []
for backend, program in json.load(sys.stdin):
    with tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if child == 0:
            os.environ["W2S_FAST_BACKEND"] = backend
            code = 1
            try:
                exec(program, {})
                code = 0
            except BaseException:
                traceback.print_exc(file=said)
                said.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        done.append((code, said.read()))
print(json.dumps(done))
"""


class Done(NamedTuple):
    """What came of a program: its exit code, and what it raised."""

    code: int
    raised: str


@pytest.fixture(scope="module")
def done() -> dict[tuple[str, str], Done]:
    """By backend and program."""
    programs = [
        ("auto", WITHOUT_TRITON),
        ("interpret", WITHOUT_TRITON),
        ("interpret", AFTER_TRITON),
        ("cuda", SCORE),
    ]
    ended = subprocess.run(
        [sys.executable, "-c", CHILDREN],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        input=json.dumps(programs),
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    return dict(zip(programs, (Done(*one) for one in json.loads(ended.stdout))))


def test_without_triton_the_operators_work(done: dict[tuple[str, str], Done]) -> None:
    assert done["auto", WITHOUT_TRITON] == (0, "")


def test_the_interpreter_without_triton_is_an_error(done: dict[tuple[str, str], Done]) -> None:
    code, raised = done["interpret", WITHOUT_TRITON]
    assert code != 0 and "ImportError" in raised.replace("ModuleNotFound", "Import")


def test_the_interpreter_cannot_be_chosen_after_triton_was_imported(
    done: dict[tuple[str, str], Done],
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: pip install 'w2s-fast[test]'")
    assert "has to be set before triton is imported" in done["interpret", AFTER_TRITON].raised


def test_a_backend_that_does_not_exist_is_named(done: dict[tuple[str, str], Done]) -> None:
    assert "'cuda'; allowed: auto, torch, interpret" in done["cuda", SCORE].raised
