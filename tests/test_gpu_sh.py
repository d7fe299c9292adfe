"""bench/gpu.sh: its parts in a dry run on the CPU; what it would run on a GPU, and for how long.

On a GPU nobody may wait for more than nine minutes, and the end has to say all in ten lines.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bench.adapters
import bench.cohorts
import bench.end_to_end
import bench.smoke
from bench import random_models as shapes
from bench.device_trace import Interval, Trace, table, trace
from bench.end_to_end import Row, WideRow, engine_for, lines
from bench.rounds import HostWaits, Spans, measure, rounds_needed
from bench.rows import Rows
from tests.support import forked_python
from w2s_fast import SearchParams
from w2s_fast.attention import Reading

ROOT = Path(__file__).parents[1]
MINUTES, GRACE = 9, 10  # for each; seconds until what is interrupted is killed
LINES, FILES = 10, 8  # at most


def gpu_sh(what: str, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "bench/gpu.sh", what, str(out)],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )


def summary(run: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """The last lines by their parts."""
    said = run.stdout.split("\n== summary\n")[1].strip().splitlines()
    assert len(said) < LINES
    return {re.split(r"  +\d+ s  ", line)[0]: line for line in said}


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    server, python = forked_python.start(tmp_path_factory.mktemp("python"))
    yield python
    server.kill()
    server.wait()


def dry_run(
    what: str, out: Path, python: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    return gpu_sh(what, out, W2S_FAST_DRY_RUN="1", PYTHON=str(python), **environment)


def read(out: Path, name: str) -> Any:
    (file,) = out.glob(f"*-dry-{name}.json")
    assert not list(out.glob("*.part"))
    return json.loads(file.read_text())


@pytest.mark.long
@pytest.mark.thorough
def test_a_dry_run_of_smoke_holds_and_counts(tmp_path: Path, python: Path) -> None:
    run = dry_run("smoke", tmp_path, python)
    assert run.returncode == 0, run.stdout + run.stderr
    said = summary(run)
    assert list(said) == ["build", "smoke", "tests"]
    assert "7 of 7 hold" in said["smoke"] and "1 waits" in said["smoke"]
    assert "skipped" in said["tests"]
    rows = {row["name"]: row for row in read(tmp_path, "smoke")["rows"]}
    assert len(rows) == len(bench.smoke.CHECKS) and all(row["ok"] for row in rows.values())
    asked = rows["what a round asks"]["found"]
    assert asked["replays"] == 6 and asked["places"]
    for name in ("waits in every pass", "capture fails"):
        assert rows[name]["found"]["told"] and rows[name]["found"]["good_engine_recorded"] > 0


@pytest.mark.long
@pytest.mark.thorough
def test_a_dry_run_of_the_search_compares_the_ways(tmp_path: Path, python: Path) -> None:
    run = dry_run("search", tmp_path, python)
    assert run.returncode == 0, run.stdout + run.stderr
    assert list(summary(run)) == ["build", "search"]
    report = read(tmp_path, "search")
    assert {"gpu", "cpu", "date", "commit", "torch", "bandwidth", "product_rate"} <= set(report)
    searches = [row for row in report["rows"] if "limit_ms" in row]
    assert [(row["way"], row["requests"]) for row in searches] == [
        ("generate", 1), ("generate", 2), ("released", 1),
        ("graphs", 1), ("graphs", 2), ("plain", 1), ("plain", 2),
        ("fusion", 1), ("fusion", 2), ("beam", 1), ("beam", 2),
    ]  # fmt: skip
    assert all(row["ms"] > 0 and not row["error"] for row in report["rows"])
    for row in searches[3:7]:
        assert 0 < row["host_ms"] <= row["ms"] and row["set_up_s"] > 0
        assert min(row["decode_ms"], row["scoring_ms"]) > 0
        assert row["decode_ms"] + row["scoring_ms"] <= row["ms"]
        assert row["of_limit"] == pytest.approx(row["limit_ms"] / row["ms"])
        assert row["device_share"] > 0
        assert (row["recordings"] > 0) == (row["way"] == "graphs")
    wide = report["rows"][len(searches) :]
    assert [(row["requests"], row["context"]) for row in wide] == [(1, 20), (2, 40)]
    assert all(0 < row["decode_ms"] < row["ms"] for row in wide)
    (rounds,) = tmp_path.glob("*-search-rounds.txt")
    assert rounds.read_text().count("a round of all of them") == 2
    assert "tiny x 2, ms a chunk: generate" in run.stdout


@pytest.mark.long
@pytest.mark.thorough
def test_a_dry_run_of_the_kernels_times_every_operator(tmp_path: Path, python: Path) -> None:
    run = dry_run("kernels", tmp_path, python)
    assert run.returncode == 0, run.stdout + run.stderr
    assert list(summary(run)) == ["build", "timings", "first use"]
    operators = {
        "copy_pages",
        "token_logprob",
        "linear_logprob",
        "sample_tokens",
        "score_select",
        "select_beams",
        "fuse_logits",
        "choose_beta",
        "paged_attention",
        "rms_norm",
        "rotate",
    }
    assert {row["name"] for row in read(tmp_path, "kernels")["rows"]} == operators
    assert "14 operators first used" in summary(run)["first use"]
    first = read(tmp_path, "first-use")["rows"]
    assert {row["name"].split(",")[0] for row in first} == operators | {"write_kv"}
    assert all(row["first_s"] > 0 and row["second_s"] > 0 for row in first)
    assert sum(row["agrees"] is True for row in first) == 11


# What stands for Python: the timings break, and the first uses take too long.
PYTHON = """#!/usr/bin/env bash
case "$*" in
    *bench.kernels*) echo "a row"; echo "broken" >&2; exit 1 ;;
    *bench.first_use*) echo "half of it"; exit 124 ;;
    *) echo "fine" ;;
esac
"""


def test_a_part_that_fails_hides_no_other(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    run = dry_run("kernels", tmp_path, python)
    assert run.returncode == 1
    said = summary(run)
    assert "ok  w2s_fast/_pages" in said["build"]
    assert said["timings"].endswith("FAILED: exit code 1  broken")
    assert said["first use"].endswith("FAILED: still running after 70 s  half of it")


def test_no_other_parts_are_known(tmp_path: Path) -> None:
    run = gpu_sh("engine", tmp_path)
    assert run.returncode == 2 and "no such parts: engine" in run.stderr


# What stands for `timeout`: it says what it was to run, and runs nothing.
TIMEOUT = r"""#!/usr/bin/env bash
printf '%s|' "${@//$'\n'/ }" "${TRITON_CACHE_DIR:-}" >> "$ASKED"
printf '\n' >> "$ASKED"
"""
NAMED = "#!/usr/bin/env bash\necho NVIDIA H100\n"


@pytest.mark.parametrize(
    ("what", "parts"),
    [
        ("smoke", ["build", "smoke", "tests", "captures", "sanitizer"]),
        ("search", ["build", "search"]),
        ("kernels", ["build", "timings", "first use", "drawn shapes"]),
        ("cohorts", ["build", "cohorts", "adapters"]),
    ],
)
def test_on_a_gpu_all_ends_within_nine_minutes(what: str, parts: list[str], tmp_path: Path) -> None:
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()
    for name, text in (
        ("timeout", TIMEOUT),
        ("nvidia-smi", NAMED),
        ("compute-sanitizer", NAMED),
    ):
        (stand_ins / name).write_text(text)
        (stand_ins / name).chmod(0o755)
    asked = tmp_path / "asked"
    run = gpu_sh(
        what,
        tmp_path / "out",
        PATH=f"{stand_ins}:{os.environ['PATH']}",
        ASKED=str(asked),
        PYTHON="true",
        W2S_FAST_DRY_RUN="",
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert list(summary(run)) == parts
    commands = [line.split("|") for line in asked.read_text().splitlines()]
    assert len(commands) == len(parts)
    assert all(command[:2] == ["--signal=INT", f"--kill-after={GRACE}"] for command in commands)
    assert sum(int(command[2]) + GRACE for command in commands) <= 60 * MINUTES
    for command in commands:
        if "--seconds" in command:  # what is under way when time is up has some left
            assert int(command[command.index("--seconds") + 1]) <= int(command[2]) - 20
    files = [word for command in commands for word in command if word.startswith(str(tmp_path))]
    files = [word for word in files if word.endswith((".json", ".xml"))]
    assert len(set(files)) == len(files) <= FILES - 1  # and a text beside one of them
    assert all("-NVIDIA-H100-" in name for name in files)
    caches = {command[-2] for command in commands if "bench.first_use" in command}
    assert what != "kernels" or (caches and not any(Path(cache).exists() for cache in caches))


def test_who_is_interrupted_keeps_the_rows_that_were_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench.end_to_end, "released_row", interrupted)
    out = tmp_path / "search.json"
    assert bench.end_to_end.main(["--dry-run", "--out", str(out)]) == 130
    report = json.loads(out.read_text())
    assert not report["complete"] and [row["way"] for row in report["rows"]] == ["generate"] * 2
    assert "tiny x 2, ms a chunk: generate" in capsys.readouterr().out


def test_what_fails_is_a_row_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("for the test")

    monkeypatch.setattr(bench.end_to_end, "search_rows", fails)
    monkeypatch.setattr(bench.end_to_end, "wide_rows", lambda *_: iter(()))
    out = tmp_path / "search.json"
    assert bench.end_to_end.main(["--dry-run", "--out", str(out)]) == 1
    rows = json.loads(out.read_text())["rows"]
    assert [row["way"] for row in rows] == [
        *("generate", "generate", "released", "graphs", "plain"),
        *("fusion", "fusion", "beam", "beam"),
    ]
    assert [row["error"] for row in rows] == [""] * 3 + ["RuntimeError: for the test"] * 2 + [
        ""
    ] * 4


def test_nothing_is_begun_when_time_is_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "smoke.json"
    assert bench.smoke.main(["--dry-run", "--seconds", "0", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["rows"] == []
    assert "left out, for want of time: half_twice" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is no GPU")
@pytest.mark.parametrize("program", [bench.smoke, bench.end_to_end, bench.cohorts, bench.adapters])
def test_without_a_gpu_only_a_dry_run_begins(program: Any, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    with pytest.raises(SystemExit, match=f"{program.__name__} looks at a GPU.* --dry-run"):
        program.main(["--out", str(out)])
    assert not out.exists()


def test_rows_are_on_disk_as_soon_as_they_are_there(tmp_path: Path) -> None:
    out = tmp_path / "new" / "report.json"
    rows = Rows(out, {"said": "before"})
    assert json.loads(out.read_text())["rows"] == []
    for count in (1, 2):
        rows.add(Row("xl", count, "plain"))
        found = json.loads(out.read_text())
        assert [row["requests"] for row in found["rows"]] == [1, 2][:count]
        assert found["said"] == "before" and not found["complete"]
    rows.say(more=1)
    rows.end()
    found = json.loads(out.read_text())
    assert found["more"] == 1 and found["complete"] and len(found["rows"]) == 2


def test_one_cohort_and_two_are_timed_at_every_number_of_rows(tmp_path: Path) -> None:
    out = tmp_path / "cohorts.json"
    assert bench.cohorts.main(["--dry-run", "--out", str(out)]) == 0
    pairs = json.loads(out.read_text())["rows"]
    assert [(pair["base"], pair["rows"]) for pair in pairs] == [("tiny", 32), ("tiny", 48)]
    assert all(pair["one_ms"] > 0 and pair["two_ms"] > 0 for pair in pairs)


def test_one_pass_of_both_sides_is_compared_with_the_model_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.adapters, "DRY", shapes.TINY)
    monkeypatch.setattr(bench.adapters, "TURNS", 1)
    out = tmp_path / "adapters.json"
    assert bench.adapters.main(["--dry-run", "--out", str(out)]) == 0
    turns = json.loads(out.read_text())["rows"]
    assert [turn["adapter"] for turn in turns] == ["r=4 on q, v", "r=16 on all"]
    assert all(min(turn["ms"], turn["to_doubled"], turn["to_apart"]) > 0 for turn in turns)


def test_the_end_says_all_in_a_line_for_each_size() -> None:
    rows = [
        Row("xl", 1, "generate", 6.0),
        Row("xl", 1, "graphs", 5.0, limit_ms=4.0, of_limit=0.8, device_share=0.9),
        Row("xl", 1, "plain", 20.0, limit_ms=4.0, of_limit=0.2, device_share=0.3),
        Row("xl", 64, "generate", error="OutOfMemoryError"),
        WideRow("wide", 1, 1000, 256, 20.0, 9.0, 17.6, None),
        WideRow("wide", 8, 1000, 256, 90.0, 30.0, 93.2, None),
    ]
    one, wide, failed = lines(rows)
    assert one.startswith("xl x 1, ms a chunk: generate 6, graphs 5, plain 20; limit 4, graphs at")
    assert one.endswith("graphs at 80 %, device busy 90 %")
    assert "1 x 1000: 20 (17.6)" in wide and "8 x 1000: 90 (93.2)" in wide
    assert failed == "failed: xl generate"


# A kernel that hides in another one, and a gap.
SEEN = Trace(
    [
        Interval("long", 0.0, 10.0),
        Interval("hidden", 2.0, 4.0),
        Interval("over", 9.0, 12.0),
        Interval("long", 20.0, 26.0),
    ],
    [],
)


def test_a_device_works_while_any_kernel_runs() -> None:
    assert SEEN.span == 26 and SEEN.busy == 18
    assert SEEN.gaps() == [(8.0, "over", "long")]
    assert Trace([], []).busy == 0


def test_what_a_round_asks_is_told_from_cudas_calls() -> None:
    def at_once(*names: str) -> list[Interval]:
        return [Interval(name, 0.0, 1.0) for name in names]

    seen = Trace(
        at_once(
            "Memcpy HtoD (Pinned -> Device)", "Memcpy HtoD (Pageable -> Device)",
            "Memcpy DtoH (Device -> Pinned)", "Memcpy DtoD (Device -> Device)", "attend",
        ),
        at_once(
            "cudaGraphLaunch", "cudaGraphLaunch", "cudaLaunchKernel", "cuLaunchKernelEx",
            "cudaMemcpyAsync", "cudaEventSynchronize", "cudaEventRecord", "cudaDeviceSynchronize",
        ),
    )  # fmt: skip
    found = bench.smoke.counts_of(seen)
    numbers = (found.reads, found.copies, found.waits, found.replays, found.launches)
    assert numbers == (1, 2, 1, 2, 2)


def test_who_enters_first_has_rounds_left_when_the_last_one_runs() -> None:
    """Prompts enter in four steps; without these rounds ahead there is less to be measured."""
    assert rounds_needed(1, 512, 10) == rounds_needed(16, 512, 10) == 2 + 1 + 10 + 1 + 2
    assert rounds_needed(64, 512, 10) == 2 + 4 + 10 + 1 + 2
    tiny = shapes.make(shapes.TINY, 0, torch.device("cpu"), torch.float32)
    guides = [shapes.make(shapes.TINY, seed, tiny.device, torch.float32) for seed in (1, 2)]
    engine = engine_for(tiny, guides, "plain", kv_cache_tokens=1024, max_pass_tokens=40)
    prompts = shapes.prompts_for(shapes.TINY, 3, 40)
    params = SearchParams(beam_width=2, successors=2, chunk_length=2, max_new_tokens=14)
    found = measure(engine, prompts, params, 10, traced=0)
    assert found.ms > 0 and found.trace is None and found.busy_ms is None
    stats = engine.stats()
    assert stats.running == stats.waiting == 0 and stats.aborted == 3
    for tokens in (8, 10):
        short = dataclasses.replace(params, max_new_tokens=tokens)
        with pytest.raises(RuntimeError, match="the first of 3 requests end before the last ones"):
            measure(engine, prompts, short, 10, traced=0)


def test_a_table_names_kernels_by_their_time_and_the_gaps_between_them() -> None:
    shown = table(SEEN).splitlines()
    assert shown[0] == "0.026 ms, the device busy for 0.018 ms, 4 kernels and copies"
    assert shown[2].split() == ["2", "0.016", "76.2%", "8.0", "long"]
    assert [line.split()[-1] for line in shown[3:5]] == ["over", "hidden"]
    assert "1     0.008  of 2 to 10 us" in table(SEEN)
    assert shown[-1].strip() == "8.0 us  between over and long"


def test_a_trace_sees_what_ran() -> None:
    a = torch.randn(64, 64)
    found = trace(lambda: a @ a, torch.device("cpu"))
    assert "aten::mm" in {one.name for one in found.device} and found.busy > 0


def test_time_counts_where_it_is_spent() -> None:
    spans, waits = Spans(torch.device("cpu")), HostWaits()
    spin = spans.around(lambda: sum(range(20_000)))
    spin()
    assert spans.take_ms() > 0 and spans.take_ms() == 0
    assert waits.around(Reading.wait)(Reading(torch.ones(2)))[0].tolist() == [1, 1]
    assert waits.seconds > 0
