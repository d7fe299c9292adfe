"""Two GPUs that hold one base together, a process each."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.tiny_models import save_trio

ROOT = Path(__file__).parents[2]
SECONDS = 180

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="less than two GPUs")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_trio(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("name", ["methods", "led", "served"])
def test_ranks_stay_together(name: str, models: Path, tmp_path: Path) -> None:
    """All of them end, and those that are asked for the same find the same, to the last bit."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment = {**os.environ, **common, "MASTER_PORT": port, "RANKS_ON": "cuda"}
    command = [sys.executable, "-m", "tests.support.rank_program", name, models, tmp_path]
    started = [
        subprocess.Popen(command, cwd=ROOT, env={**environment, "RANK": r, "LOCAL_RANK": r})
        for r in ("0", "1")
    ]
    try:
        assert [process.wait(SECONDS) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
    first, second = (json.loads((tmp_path / f"{r}.json").read_text()) for r in range(2))
    same: list[str] = {"methods": list(first), "led": ["after", "pools", "counts"]}.get(name, [])
    found: dict[str, Any] = first
    for what in same:
        assert found[what] == second[what]
