"""Reports as JSON, whole at every moment: what interrupts a measurement leaves what it has."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.machine import machine_facts
from bench.timing import commit

INTERRUPTED = 130  # the exit code that a shell gives for it: 128 + SIGINT


def save(path: Path | None, report: dict[str, Any], *, complete: bool) -> None:
    """Put a report in the place of the one that stood there, all at once.

    Args:
        path: None: nowhere.
        complete: whether this is all, and nothing will follow; the report says so.
    """
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.part")
    try:
        beside.write_text(json.dumps({**report, "complete": complete}, indent=1) + "\n")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def run(main: Callable[[], int]) -> int:
    """The exit code of a program that saves its results as they come, and may be interrupted."""
    # Where it was started in the background of a script, SIGINT would be ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return main()
    except KeyboardInterrupt:
        print("interrupted; what was measured until here is kept", file=sys.stderr)
        return INTERRUPTED


def facts(program: str, arguments: Sequence[str]) -> dict[str, Any]:
    """What a reader of a report must know of the run: command, commit, machine, versions."""
    return {
        "command": " ".join([f"python -m {program}", *arguments]),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        **machine_facts(),
    }
