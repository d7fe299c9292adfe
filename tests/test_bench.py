"""The benchmarks' logic, in a dry run on the CPU: every case runs, and the report is whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def dry_run(out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "bench/gpu.sh", str(out)],
        cwd=ROOT,
        env={**os.environ, "W2S_FAST_DRY_RUN": "1", "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
    )


def test_a_dry_run_times_every_kernel_and_ends_with_a_summary(tmp_path: Path) -> None:
    run = dry_run(tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    last = run.stdout.strip().splitlines()[-3:]
    assert last[0] == "== summary"
    assert [line.split()[0] for line in last[1:]] == ["build", "timings"]
    assert all(line.endswith("ok") for line in last[1:])

    (file,) = tmp_path.glob("*-kernels-dry.json")
    report = json.loads(file.read_text())
    assert report["dry_run"]
    assert {"gpu", "date", "commit", "command", "torch", "copy_gb_per_s"} <= set(report)
    names = {row["name"] for row in report["rows"]}
    assert names == {
        "token_logprob",
        "linear_logprob",
        "sample_tokens",
        "select_beams",
        "fuse_logits",
        "choose_beta",
    }
    assert all(row["us"] > 0 and not row["error"] for row in report["rows"])


def test_a_part_that_fails_hides_no_other(tmp_path: Path) -> None:
    run = dry_run(tmp_path, W2S_FAST_BACKEND="no such backend")  # the timings cannot start
    assert run.returncode == 1
    build, timings = run.stdout.strip().splitlines()[-2:]
    assert build.startswith("build") and build.endswith("ok")
    assert timings.startswith("timings") and "FAILED: exit code 1" in timings


def test_a_dry_run_times_the_cpus_attention_with_and_without_a_tree(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "bench.cpu_attention", "--dry-run", "--out", str(out)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [(row["what"], row["requests"]) for row in rows] == [
        ("decode", 1),
        ("append", 1),
        ("decode", 2),
        ("append", 2),
    ]
    assert all(min(row["tree_ms"], row["flat_ms"], row["dense_ms"]) > 0 for row in rows)
