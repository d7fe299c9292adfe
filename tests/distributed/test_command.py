"""The commands with --tensor-parallel: one process is asked, and the others are started by it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from bench.serving import served
from tests.support.tiny_models import save_trio

COMMAND = [sys.executable, "-m", "w2s_fast.cli"]
SECONDS = 120
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = save_trio(tmp_path_factory.mktemp("models"))
    named = {"base": "llama", "tuned": "tuned", "untuned": "untuned"}
    models = [part for role, name in named.items() for part in (f"--{role}", str(root / name))]
    return [*models, "--device", "cpu", "--dtype", "float64"]


def records(path: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted(found, key=lambda record: int(record["index"]))


def ranks_of(pid: int) -> list[int]:
    """The processes that a command has started, as long as they run."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def gone(pids: list[int]) -> bool:
    end = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def test_a_file_is_answered_as_by_one_process(named: list[str], tmp_path: Path) -> None:
    lines = [{"prompt": f"line {i}", "seed": i} for i in range(6)]
    asked = "".join(json.dumps(line) + "\n" for line in lines).encode()
    found = {}
    for size in ("1", "2"):
        output = tmp_path / f"{size}.jsonl"
        options = ["--max-new-tokens", "8", "--tensor-parallel", size, "--output", str(output)]
        ran = subprocess.run(
            [*COMMAND, "generate", "--input", "-", *named, *options],
            input=asked,
            env=ENVIRONMENT,
            capture_output=True,
            timeout=SECONDS,
        )
        assert ran.returncode == 0, ran.stderr.decode()
        # What is said is said once.
        assert ran.stderr.count(b"written to") == 1 and ran.stdout == b""
        found[size] = [
            (record["text"], record["token_ids"], pytest.approx(record["score"]))
            for record in records(output)
        ]
    assert found["1"] == found["2"] and len(found["1"]) == len(lines)


@pytest.fixture(scope="module")
def server(named: list[str]) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    with served([*named, "--tensor-parallel", "2", "--name", "two"]) as (url, process):
        yield url, process


@pytest.mark.skipif(sys.platform != "linux", reason="children are read from /proc")
class TestServer:
    """In this order: the last one ends it."""

    def test_it_answers(self, server: tuple[str, subprocess.Popen[str]]) -> None:
        url, process = server
        assert len(ranks_of(process.pid)) == 1
        body = {"prompt": "a film", "max_tokens": 8, "seed": 1}
        with httpx2.Client(base_url=url, timeout=60) as http:
            first = http.post("/v1/completions", json=body).json()
            assert http.post("/v1/completions", json=body).json()["choices"] == first["choices"]
            with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as lines:
                events = [line for line in lines.iter_lines() if line.startswith("data: {")]
            text = "".join(json.loads(e[6:])["choices"][0]["text"] for e in events[:-1])
            assert first["choices"][0]["text"].startswith(text)
            scores = {"query": "a film", "items": [" that begins", " that ends"]}
            told = http.post("/v1/score", json=scores)
            assert told.status_code == 200 and len(told.json()["scores"]) == 2

    def test_it_ends_where_a_rank_dies(self, server: tuple[str, subprocess.Popen[str]]) -> None:
        _, process = server
        os.kill(ranks_of(process.pid)[0], signal.SIGKILL)
        assert process.wait(60) == 1


@pytest.mark.thorough
def test_whoever_is_interrupted_leaves_no_rank_behind(named: list[str], tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": "x" * 20, "seed": i}) for i in range(400)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    output = tmp_path / "out.jsonl"
    options = ["--tensor-parallel", "2", "--max-new-tokens", "60", "--output", str(output)]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(
        [*COMMAND, "generate", "--input", str(tmp_path / "in.jsonl"), *named, *options],
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
    ) as process:
        end = time.monotonic() + SECONDS
        while not output.exists() or not output.read_bytes().count(b"\n"):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.02)
        started = ranks_of(process.pid)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=SECONDS)
    assert process.returncode == 130, told.decode()
    assert b"--resume goes on" in told and b"Traceback" not in told
    assert len(started) == 1 and gone(started)


def test_what_goes_wrong_is_told(named: list[str]) -> None:
    ran = subprocess.run(
        [*COMMAND, "generate", "x", *named, "--tensor-parallel", "3"],
        env=ENVIRONMENT,
        capture_output=True,
        timeout=SECONDS,
    )
    assert ran.returncode == 2
    assert "num_attention_heads is 4; allowed: a multiple of 3" in ran.stderr.decode()
