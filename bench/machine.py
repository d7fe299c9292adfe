"""The machine that a report was measured on, and what else it had to do meanwhile."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def machine_seconds() -> tuple[float, float, float] | None:
    """Processor seconds so far: of all cores, busy ones, and this process with its children."""
    try:
        fields = [int(field) for field in Path("/proc/stat").read_text().split()[1:9]]
    except OSError:
        return None
    ticks = os.sysconf("SC_CLK_TCK")
    total, idle = sum(fields), fields[3] + fields[4]  # man 5 proc: idle, iowait
    own = os.times()
    ours = own.user + own.system + own.children_user + own.children_system
    return total / ticks, (total - idle) / ticks, ours


def share_of_others(
    start: tuple[float, float, float] | None, end: tuple[float, float, float] | None
) -> float | None:
    """How much of the machine other programs took between two :func:`machine_seconds`."""
    if start is None or end is None or end[0] == start[0]:
        return None
    total, busy, ours = (after - before for before, after in zip(start, end))
    return max(0.0, busy - ours) / total


def machine_facts() -> dict[str, Any]:
    """The machine, and the versions of what runs there."""
    return {
        "cpu": processor(),
        "cores": cores(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "triton": _version("triton"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
