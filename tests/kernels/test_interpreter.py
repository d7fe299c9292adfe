"""The kernels are right where there is no GPU: tests/interpret runs in Triton's interpreter.

`make test` runs these files by themselves, spread over the cores test by test, and says so by
W2S_FAST_INTERPRETED; a plain `pytest` runs them from here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path.name for path in (ROOT / "tests" / "interpret").glob("test_*.py"))


@pytest.mark.skipif("W2S_FAST_INTERPRETED" in os.environ, reason="run by themselves")
@pytest.mark.parametrize("file", FILES)
def test_the_kernels_are_right_in_the_interpreter(file: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: pip install 'w2s-fast[test]'")
    environment = {**os.environ, "W2S_FAST_BACKEND": "interpret"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    session = subprocess.run(
        [*command, f"tests/interpret/{file}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    if session.returncode != 0:
        pytest.fail(session.stdout + session.stderr, pytrace=False)
