"""Cores: those of the affinity, or what the control groups leave of their time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from w2s_fast.models import Cores, usable_cores

ALL = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
V1, V2 = "sys/fs/cgroup/cpu,cpuacct", "sys/fs/cgroup"


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


def in_v1(root: Path, group: str, top: str = "/") -> None:
    mount = f"33 25 0:30 {top} /{V1} rw - cgroup cgroup rw,cpu,cpuacct"
    write(root, {"proc/self/cgroup": f"4:cpu,cpuacct:{group}", "proc/self/mountinfo": mount})


def in_v2(root: Path, group: str, top: str = "/") -> None:
    mount = f"33 25 0:30 {top} /{V2} rw - cgroup2 cgroup2 rw"
    write(root, {"proc/self/cgroup": f"0::{group}", "proc/self/mountinfo": mount})


def test_without_control_groups_they_are_those_of_the_affinity(tmp_path: Path) -> None:
    assert usable_cores(tmp_path) == Cores(ALL, None)


def test_a_quota_of_version_2_counts_and_so_do_those_around_it(tmp_path: Path) -> None:
    in_v2(tmp_path, "/pod/own")
    write(tmp_path, {f"{V2}/pod/own/cpu.max": "max 100000"})
    assert usable_cores(tmp_path).quota is None
    write(tmp_path, {f"{V2}/pod/cpu.max": "150000 100000"})
    assert usable_cores(tmp_path).quota == 1.5
    write(tmp_path, {f"{V2}/pod/own/cpu.max": "50000 100000"})
    assert usable_cores(tmp_path) == Cores(ALL, 0.5)


def test_a_quota_of_version_1_counts(tmp_path: Path) -> None:
    in_v1(tmp_path, "/docker/1f", top="/docker/1f")  # what is mounted is the group itself
    none = {f"{V1}/cpu.cfs_quota_us": "-1", f"{V1}/cpu.cfs_period_us": "100000"}
    write(tmp_path, none)
    assert usable_cores(tmp_path).quota is None
    write(tmp_path, {f"{V1}/cpu.cfs_quota_us": "300000"})
    assert usable_cores(tmp_path).quota == 3.0


@pytest.mark.parametrize("text", ["", "max", "nonsense", "0 100000", "max max"])
def test_what_says_nothing_limits_nothing(tmp_path: Path, text: str) -> None:
    in_v2(tmp_path, "/")
    write(tmp_path, {f"{V2}/cpu.max": text})
    assert usable_cores(tmp_path).quota is None


@pytest.mark.parametrize(
    ("cores", "threads"),
    [(Cores(8, None), 8), (Cores(8, 2.0), 2), (Cores(8, 1.5), 2), (Cores(8, 0.1), 1)],
)
def test_a_part_of_a_core_takes_a_thread(cores: Cores, threads: int) -> None:
    assert cores.usable == threads
    assert Cores(2, 16.0).usable == 2
