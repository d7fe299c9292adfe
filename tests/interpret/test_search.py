"""A whole search on interpreted kernels finds what it finds on torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.interpret.rule import INTERPRETED
from tests.interpret.search_results import results
from w2s_fast.attention.kernel import KernelPlan

ROOT = Path(__file__).parents[2]


@pytest.mark.thorough
@INTERPRETED  # the search runs on the CPU
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
    attend, depths = KernelPlan.attend, []

    def seen(self: KernelPlan, *args: Any) -> Any:
        depths.append(0 if self.shared is None else 1 + int((self.shared.parts > 1).any()))
        return attend(self, *args)

    with mock.patch.object(KernelPlan, "attend", seen):
        found = results()
    assert json.loads(json.dumps(found)) == json.loads(on_torch.stdout)
    assert {0, 1, 2} == set(depths)  # nothing shared, a prompt, a prompt and histories
