"""How benchmarks take times, keep them, and compare them.

What is called of CUDA is stood in for: its time is a number that calls add to.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_benchmark.cli
import torch

import bench.kernels
import bench.search
from bench import reports
from bench.timing import CALLS_A_WALK, Timing, ToldClock, Walk, time_call
from tests.support.cuda import Cuda, cuda

__all__ = ["cuda"]

BENCH = Path(__file__).parents[1] / "bench"


class Device:
    """A stand-in for a GPU whose milliseconds are told by its calls.

    Attributes:
        launched: input sets, by Python, call by call; what a graph replays is not among them.
        waited: how often the host has waited for the device.
    """

    def __init__(self) -> None:
        self.ms = torch.zeros(())
        self.launched: list[int] = []
        self.waited = 0

    def call(self, ms: torch.Tensor) -> None:
        """Takes so long on the device."""
        self.launched.append(id(ms))
        self.ms.add_(ms)

    def waits(self, ms: torch.Tensor) -> None:
        """The same, with the host waiting for it."""
        self.call(ms)
        self.ms.item()

    def synchronize(self, device: Any = None) -> None:
        self.waited += 1


@pytest.fixture
def device(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.ms = float(device.ms)

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return end.ms - self.ms

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", device.synchronize)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return device


def test_a_walk_is_one_graph_over_all_input_sets(device: Device, cuda: Cuda) -> None:
    inputs = [torch.tensor(ms) for ms in (1.0, 2.0, 6.0)]
    walk = Walk(device.call, inputs)
    assert cuda.captures == 1 and walk.not_recorded == ""
    assert walk.calls % 3 == 0 and walk.calls <= CALLS_A_WALK
    # The stream of the capture has waited for the one that the inputs were made on.
    assert cuda.waits[0][1] == 0 and cuda.waits[0][0] != 0
    device.launched.clear()
    assert walk.seconds() == pytest.approx(3e-3)
    assert not device.launched  # all of it was replayed


def test_every_input_set_is_taken_in_its_turn(device: Device) -> None:
    inputs = [torch.tensor(1.0) for _ in range(CALLS_A_WALK + 2)]
    walk = Walk(device.call, inputs)
    assert walk.calls == len(inputs)  # no set twice before all have been taken
    recorded = device.launched[-walk.calls :]
    assert recorded == [id(item) for item in inputs]


def test_the_hosts_time_is_taken_apart_and_waits_for_nothing(device: Device) -> None:
    walk = Walk(device.call, [torch.tensor(1.0)])
    device.launched.clear()
    device.waited = 0
    seconds = walk.host_seconds()
    assert seconds is not None and seconds > 0
    assert len(device.launched) == 5 * bench.timing.LAUNCHES and device.waited == 6


def test_a_call_that_waits_for_the_device_is_launched_one_by_one_and_says_so(
    device: Device, cuda: Cuda
) -> None:
    timing = time_call(device.waits, [torch.tensor(1.0), torch.tensor(3.0)])
    assert timing.device_s == pytest.approx(2e-3)
    assert timing.not_recorded and cuda.captures == 0
    assert time_call(device.call, [torch.tensor(2.0)]).not_recorded == ""  # others still are


def test_on_a_cpu_there_is_one_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    timing = time_call(lambda x: x + 1, [torch.zeros(3)] * 2)
    assert timing == Timing(timing.device_s) and timing.device_s > 0


def test_a_told_clock_goes_on_by_what_it_is_told() -> None:
    clock = ToldClock()
    begin = clock.now()
    clock.add(0.25)
    assert clock.now() - begin == 0.25


def test_a_report_takes_the_place_of_the_last_one_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "new" / "report.json"
    reports.save(out, {"rows": [1]}, complete=False)
    with pytest.raises(TypeError):
        reports.save(out, {"rows": [1, object()]}, complete=True)
    assert json.loads(out.read_text()) == {"rows": [1], "complete": False}
    assert [path.name for path in out.parent.iterdir()] == ["report.json"]


@pytest.fixture
def own_interrupts() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a script
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("own_interrupts")
def test_timings_that_are_interrupted_keep_their_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure, measured = bench.kernels.measure, []

    def interrupted(*args: Any) -> Any:
        if len(measured) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        measured.append(measure(*args))
        return measured[-1]

    monkeypatch.setattr(bench.kernels, "measure", interrupted)
    out = tmp_path / "kernels.json"
    options = ["--dry-run", "--out", str(out)]
    assert reports.run(lambda: bench.kernels.main(options)) == 130
    found = json.loads(out.read_text())
    assert [row["us"] for row in found["rows"]] == [row.us for row in measured]
    assert len(measured) == 2 and not found["complete"]
    assert "is kept" in capsys.readouterr().err


@pytest.mark.usefixtures("own_interrupts")
def test_a_search_that_is_interrupted_keeps_the_turns_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Turns:
        def __init__(self, case: object) -> None: ...

        def run(self, variant: str, seed: int = 0, new_tokens: int | None = None) -> int:
            if seed == 2:
                raise KeyboardInterrupt
            return 100

    monkeypatch.setattr(bench.search, "Bench", Turns)
    out = tmp_path / "search.json"
    options = ["--quick", "--no-memory", "--only", "batch", "--repeats", "3", "--out", str(out)]
    assert reports.run(lambda: bench.search.main(options)) == 130
    found = json.loads(out.read_text())
    (case,) = found["cases"]
    assert [len(variant["seconds"]) for variant in case["variants"].values()] == [2, 2]
    assert not found["complete"]


def test_a_case_that_fails_is_a_row_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cases(*_: Any) -> Iterator[Any]:
        def fails() -> Any:
            raise ValueError("no such shape")

        yield bench.kernels.Case("first", "[1]", fails)
        yield bench.kernels.Case("second", "[2]", lambda: bench.kernels.Work(abs, [1, 2], moved=8))

    monkeypatch.setattr(bench.kernels, "cases", cases)
    monkeypatch.setattr(bench.kernels, "attention_cases", lambda *_: ())
    out = tmp_path / "kernels.json"
    assert bench.kernels.main(["--dry-run", "--out", str(out)]) == 1
    found = json.loads(out.read_text())
    first, second = found["rows"]
    assert first["error"] == "ValueError: no such shape" and first["us"] is None
    assert second["us"] > 0 and second["gb_per_s"] == pytest.approx(8e-3 / second["us"])
    assert found["complete"]


INTERRUPTED = """
def test_first(benchmark):
    benchmark.pedantic(int, rounds=3)


def test_second(benchmark):
    def interrupted():
        raise KeyboardInterrupt

    benchmark.pedantic(interrupted, rounds=3)
"""


def test_benchmarks_that_are_interrupted_keep_those_that_were_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # workers take no times
    file, out = tmp_path / "test_interrupted.py", tmp_path / "out.json"
    file.write_text(INTERRUPTED)
    options = ["-q", "-p", "no:logging", "-p", "bench.conftest", f"--benchmark-json={out}"]
    assert pytest.main([*options, str(file)]) == pytest.ExitCode.INTERRUPTED
    (first,) = json.loads(out.read_text())["benchmarks"]
    assert first["name"] == "test_first" and first["stats"]["rounds"] == 3


# Some of every group: other tests run all operators and searches.
CHEAP = "page or round or token_logprob or attention or small-guides or (call and bpe-first)"


def saved_run(out: Path, *options: str) -> dict[str, Any]:
    """What `pytest bench/` saves, run here, where all that it imports is there."""
    assert pytest.main(["-q", "--quick", f"--benchmark-json={out}", *options]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.mark.long
def test_all_groups_are_timed_and_two_saved_runs_compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # workers take no times
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    found = saved_run(before, str(BENCH), "-k", CHEAP)
    assert {one["group"] for one in found["benchmarks"]} == {
        "page manager",
        "host's part of a round",
        "operators",
        "searches",
        "translation",
    }
    assert all(one["stats"]["rounds"] == 2 for one in found["benchmarks"])
    assert all(one["stats"]["median"] > 0 for one in found["benchmarks"])
    assert found["commit_info"]["id"] and found["machine_info"]["w2s_fast"]["torch"]
    shares = [
        one["extra_info"]["share_of_copy"]
        for one in found["benchmarks"]
        if "token_logprob" in one["name"]
    ]
    assert shares and all(share > 0 for share in shares)

    saved_run(after, str(BENCH / "bench_page_manager.py"))
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["pytest-benchmark", "compare", str(before), str(after)])
    pytest_benchmark.cli.main()
    lines = capsys.readouterr().out.splitlines()
    compared = [line for line in lines if line.startswith("test_page_table (")]
    assert len(compared) == 2
    assert all(any(f"/{name})" in line for line in compared) for name in ("before", "after"))
