"""Control groups of Linux: the folders in which limits of this program stand.

A container sees the whole machine; what it may use stands in the files of its control group
(cgroup v1 or v2) and of those around it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Group(NamedTuple):
    """The folder of a control group, of version 1 or 2."""

    folder: Path
    version: int


def groups_of(controller: str, root: Path) -> Iterator[Group]:
    """This program's group of a controller, such as ``"memory"``, and all around it, up to the
    mount point.

    ``root``: where ``proc`` lies, and the mount points that it names.
    """
    groups: dict[str, str] = {}  # its group's path, by controller; "" is version 2
    for line in lines_of(root / "proc/self/cgroup"):
        _, controllers, group = line.split(":", 2)
        groups.update(dict.fromkeys(controllers.split(","), group))
    for line in lines_of(root / "proc/self/mountinfo"):
        mount, _, kind = line.partition(" - ")
        top, point = mount.split()[3:5]
        system, *_, options = kind.split()
        if system == "cgroup2" and "" in groups:
            group, version = groups[""], 2
        elif system == "cgroup" and controller in groups and controller in options.split(","):
            group, version = groups[controller], 1
        else:
            continue
        folder = mounted = root / point.lstrip("/")
        # What is mounted may be the group itself, and is in most containers.
        if os.path.commonpath([top, group]) == top:
            folder = mounted / os.path.relpath(group, top)
        yield Group(mounted, version)
        while folder != mounted:
            yield Group(folder, version)
            folder = folder.parent


def lines_of(path: Path) -> list[str]:
    """Of a file; none if it cannot be read."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def number_in(path: Path) -> int | None:
    """The number in a file; None: there is no file, or it says "max"."""
    text = "".join(lines_of(path)).strip()
    return int(text) if text.isdecimal() else None
