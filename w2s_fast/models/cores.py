"""Cores that this program may use: by its affinity, and by the quota of its control groups."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import NamedTuple

from w2s_fast.models.control_groups import Group, groups_of, lines_of, number_in

_ROOT = Path("/")


class Cores(NamedTuple):
    """What this program may use of a CPU.

    ``allowed``: cores that it may run on. ``quota``: of their time, in cores; None: all of it.
    """

    allowed: int
    quota: float | None

    @property
    def usable(self) -> int:
        """Threads that can run at a time; a part of a core counts as one."""
        return self.allowed if self.quota is None else min(self.allowed, math.ceil(self.quota))


def usable_cores(root: Path = _ROOT) -> Cores:
    """``root``: where ``proc`` lies, and the mount points that it names."""
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
    else:
        allowed = os.cpu_count() or 1
    quotas = [quota for group in groups_of("cpu", root) if (quota := _quota(group)) is not None]
    return Cores(allowed, min(quotas, default=None))


def _quota(group: Group) -> float | None:
    if group.version == 2:
        words = "".join(lines_of(group.folder / "cpu.max")).split()
        numbers = [int(word) for word in words if word.isdecimal()]
        time, period = numbers if len(numbers) == 2 else (None, None)  # "max 100000": none
    else:
        time = number_in(group.folder / "cpu.cfs_quota_us")  # -1 where there is none
        period = number_in(group.folder / "cpu.cfs_period_us")
    return time / period if time and period else None
