"""The kernels are right where there is no GPU: tests/interpret runs in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path.name for path in (ROOT / "tests" / "interpret").glob("test_*.py"))


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
