"""Main memory that this program may use: the machine's, or what its control groups leave of it.

Who takes more than these allow is killed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from w2s_fast.models.control_groups import groups_of, lines_of, number_in

_ROOT = Path("/")


class Memory(NamedTuple):
    """Bytes.

    ``free``: can be had now. ``total``: of the machine, or of the limit that leaves the least.
    ``limit``: the file that this limit stands in; None: the machine itself.
    """

    free: int
    total: int
    limit: Path | None


class _Files(NamedTuple):
    """What the files of a version of control groups are called."""

    limits: tuple[str, ...]
    usage: str
    cache: tuple[str, ...]  # fields of memory.stat: pages that can be given up at any time


_V1 = _Files(
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    ("total_active_file", "total_inactive_file"),
)
_V2 = _Files(
    ("memory.max", "memory.high"),
    "memory.current",
    ("active_file", "inactive_file", "slab_reclaimable"),
)


def main_memory(root: Path = _ROOT) -> Memory:
    """What leaves the least: the machine, or one of the control groups around this program.

    ``root``: where ``proc`` lies, and the mount points that it names.
    """
    return min([_machine(root), *_groups(root)], key=lambda memory: memory.free)


def _machine(root: Path) -> Memory:
    fields = _fields(root / "proc/meminfo")
    if "MemAvailable" not in fields:  # not Linux: all that the machine has
        whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return Memory(whole, whole, None)
    free = fields["MemAvailable"] * 1024
    return Memory(free, fields.get("MemTotal", 0) * 1024 or free, None)


def _groups(root: Path) -> Iterator[Memory]:
    for folder, version in groups_of("memory", root):
        files = _V1 if version == 1 else _V2
        used = number_in(folder / files.usage)
        cache = _fields(folder / "memory.stat")
        for name in files.limits:
            limit = number_in(folder / name)
            if limit is not None and used is not None:
                held = max(0, used - sum(cache.get(field, 0) for field in files.cache))
                yield Memory(max(0, limit - held), limit, folder / name)


def _fields(path: Path) -> dict[str, int]:
    """Numbers by name, of lines such as "name: 12 kB" and "name 12"."""
    pairs = [line.replace(":", " ").split() for line in lines_of(path)]
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) > 1 and pair[1].isdecimal()}
