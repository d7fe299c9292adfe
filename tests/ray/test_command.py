"""`w2s-fast generate --ray`: one output, whoever answers, and whatever interrupts it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

from tests.support.command import run
from tests.support.tiny_models import save_tiny

pytestmark = pytest.mark.long

OPTIONS = ["--max-new-tokens", "12", "--beam-width", "2", "--successors", "2", "--dtype", "float64"]
COUNT = 300


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of which one line cannot be used, and another one's request fails."""
    path = tmp_path_factory.mktemp("prompts") / "in.jsonl"
    lines = [json.dumps({"prompt": f"The film number {i}", "seed": i}) for i in range(COUNT)]
    lines[3], lines[5] = "bad", json.dumps({"prompt": [10**8]})
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def plain(prompts: Path) -> list[str]:
    """The lines that a run without Ray writes."""
    path = prompts.with_name("plain.jsonl")
    assert run("generate", "--input", prompts, "--output", path, *OPTIONS).exit_code == 1
    return sorted(path.read_text().splitlines())


@pytest.mark.cluster
def test_an_actor_s_engine_may_be_of_several_ranks(ray_here: None, tmp_path: Path) -> None:
    save_tiny(tmp_path / "base", "llama", seed=3)
    save_tiny(tmp_path / "tuned", "gpt2", seed=1)
    save_tiny(tmp_path / "untuned", "gpt2", seed=2)
    roles = ("base", "tuned", "untuned")
    named = [part for role in roles for part in (f"--{role}", str(tmp_path / role))]
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"a {i}", "seed": i}) for i in range(20)))
    found = []
    for where in (["--device", "cpu"], ["--ray", "--device", "cpu", "--tensor-parallel", "2"]):
        output = tmp_path / f"{len(found)}.jsonl"
        ran = run("generate", "--input", path, "--output", output, *named, *OPTIONS, *where)
        assert ran.exit_code == 0, ran.output
        records = [json.loads(line) for line in output.read_text().splitlines()]
        found.append(sorted((r["index"], r["token_ids"]) for r in records))
    assert found[0] == found[1] and len(found[0]) == 20


def interrupted(prompts: Path, output: Path, by: int) -> int:
    """A run on the Ray that is there, in a process that is ended in its midst; its exit code."""
    command = [sys.executable, "-m", "w2s_fast.cli", "generate", "--ray", "--actors", "1"]
    address = ray.get_runtime_context().gcs_address
    with subprocess.Popen(
        [*command, "--input", str(prompts), "--output", str(output), *OPTIONS],
        env={**os.environ, "RAY_ADDRESS": address},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        end = time.monotonic() + 120
        while not output.exists() or output.read_bytes().count(b"\n") < 20:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        # It can be read while it grows: all but the last line are whole.
        for line in output.read_text().split("\n")[:-1]:
            json.loads(line)
        told = ended(process, by)
    if by == signal.SIGINT:
        assert "--resume goes on" in told
    assert 20 <= output.read_bytes().count(b"\n") < COUNT
    return process.returncode


def ended(process: subprocess.Popen[str], by: int) -> str:
    """What it said, once it has ended: Ray's own code may swallow a signal, so it is sent again, as
    people press Ctrl-C again."""
    for _ in range(10):
        process.send_signal(by)
        try:
            return process.communicate(timeout=4)[1]
        except subprocess.TimeoutExpired:
            continue
    raise AssertionError("it does not end")


@pytest.mark.usefixtures("ray_here")
def test_an_interrupted_run_is_gone_on_with_without_ray(
    prompts: Path, plain: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    assert interrupted(prompts, output, signal.SIGINT) == 130
    resumed = run("generate", "--input", prompts, "--output", output, "--resume", *OPTIONS)
    assert resumed.exit_code == 1
    assert sorted(output.read_text().splitlines()) == plain


@pytest.mark.cluster
@pytest.mark.usefixtures("ray_here")
def test_a_run_whose_process_was_killed_is_gone_on_with_on_ray(
    prompts: Path, plain: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    assert interrupted(prompts, output, signal.SIGKILL) == -signal.SIGKILL
    arguments = ["--input", prompts, "--output", output, "--resume", "--ray", "--actors", "2"]
    assert run("generate", *arguments, *OPTIONS).exit_code == 1
    assert sorted(output.read_text().splitlines()) == plain


def test_ray_goes_with_an_input_and_actors_with_ray(prompts: Path) -> None:
    assert "--ray goes with --input" in run("generate", "The film", "--ray").stderr
    told = run("generate", "--input", prompts, "--actors", "2").stderr
    assert "--actors goes with --ray" in told
    assert run("generate", "--input", prompts, "--ray", "--actors", "0").exit_code == 2
