"""A whole search on interpreted kernels finds what it finds on torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.interpret.search_results import results

ROOT = Path(__file__).parents[2]


def test_a_search_on_the_kernels_gives_the_cpu_paths_tokens() -> None:
    environment = {**os.environ, "W2S_FAST_BACKEND": "torch"}
    environment.pop("TRITON_INTERPRET", None)
    on_torch = subprocess.run(
        [sys.executable, "-m", "tests.interpret.search_results"],
        cwd=ROOT,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    assert json.loads(json.dumps(results())) == json.loads(on_torch.stdout)
