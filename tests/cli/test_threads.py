"""Torch's threads, as the command sets them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from w2s_fast import models
from w2s_fast.cli import threads
from w2s_fast.models import Cores

# What a command leaves behind that ends before it needs torch.
STARTED = """
import json, os, sys
from w2s_fast.cli import app
app(["generate", "--input", "/no/such/file"], standalone_mode=False)
names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
print(json.dumps([{name: os.environ.get(name) for name in names}, "torch" in sys.modules]))
"""


def started(**environment: str) -> list[object]:
    unset = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run(
        [sys.executable, "-c", STARTED],
        env={**unset, **environment},
        stdout=subprocess.PIPE,
        check=True,
    )
    found: list[object] = json.loads(done.stdout)
    return found


def test_waiting_threads_soon_sleep_and_that_is_set_before_torch_looks() -> None:
    ours = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": None}
    if sys.platform == "linux":
        ours = {"OMP_WAIT_POLICY": None, "GOMP_SPINCOUNT": "6000"}
    assert started() == [ours, False]


@pytest.mark.parametrize(
    "own", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}], ids=lambda own: next(iter(own))
)
def test_what_the_user_has_set_stays(own: dict[str, str]) -> None:
    nothing = dict.fromkeys(("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"))
    assert started(**own) == [{**nothing, **own}, False]


def test_a_quota_takes_threads_unless_the_user_has_counted_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(models, "usable_cores", lambda: Cores(64, 1.5))
    try:
        torch.set_num_threads(4)
        monkeypatch.setenv("OMP_NUM_THREADS", "4")
        threads.take_usable_cores()
        assert torch.get_num_threads() == 4
        monkeypatch.delenv("OMP_NUM_THREADS")
        threads.take_usable_cores()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
