"""Other engines import one module, and every operator is there."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

import w2s_fast.ops as ops

ROOT = Path(__file__).parents[1]
# From each operator's own file: what it asks the library to register.
SCHEMAS = [
    re.findall(r'^_operator = register\(\s*"(\w+)\(', path.read_text(), re.MULTILINE)
    for path in (ROOT / "kernels").glob("*.py")
]
OPERATORS = sorted(name for names in SCHEMAS for name in names)


def test_one_import_registers_every_operator_and_neither_transformers_nor_the_engine() -> None:
    script = (
        "import sys, torch, w2s_fast\n"
        "assert not hasattr(torch.ops.w2s_fast, 'token_logprob')\n"
        "import w2s_fast.ops\n"
        f"missing = [n for n in {OPERATORS} if not hasattr(torch.ops.w2s_fast, n)]\n"
        "loaded = [m for m in sys.modules if m.split('.')[0] == 'transformers'\n"
        "          or m.startswith(('w2s_fast.engine', 'w2s_fast.models', 'w2s_fast.search'))]\n"
        "print(missing, loaded)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "[] []", done.stdout + done.stderr


def test_there_is_a_documented_function_for_every_operator() -> None:
    assert len(OPERATORS) >= 11
    for name in OPERATORS:
        function = getattr(ops, name)
        assert name in ops.__all__
        assert function.__module__ == f"w2s_fast.kernels.{name}"
        assert len(inspect.getdoc(function) or "") > 200


def test_a_function_calls_the_operator_of_its_name() -> None:
    logits, tokens = torch.randn(3, 11), torch.tensor([4, 0, 10])
    expected = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(ops.token_logprob(logits, tokens), expected)
