"""A report that is whole at any moment: who is interrupted keeps the rows that were there."""

from __future__ import annotations

import json
import os
import platform
import signal
import time
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from bench.machine import processor
from bench.timing import commit


class Report:
    """Rows, and what is said of all of them, in a JSON file that is written anew for each."""

    def __init__(self, out: Path, command: str, **said: Any) -> None:
        """``said``: beside the machine, the versions and the commit."""
        cuda = torch.cuda.is_available()
        self._out = out
        self._said = {
            "command": command,
            "device": torch.cuda.get_device_name() if cuda else processor(),
            "date": time.strftime("%Y-%m-%d"),
            "commit": commit(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            **said,
        }
        self.rows: list[Any] = []
        out.parent.mkdir(parents=True, exist_ok=True)
        self._write()

    def add(self, row: Any) -> None:
        """``row``: a dataclass, or what JSON has."""
        self.rows.append(row)
        self._write()

    def say(self, **more: Any) -> None:
        """Of all rows."""
        self._said |= more
        self._write()

    def _write(self) -> None:
        rows = [asdict(row) if is_dataclass(row) else row for row in self.rows]  # type: ignore[arg-type]
        beside = self._out.with_name(f"{self._out.name}.part")
        beside.write_text(json.dumps({**self._said, "rows": rows}, indent=1) + "\n")
        os.replace(beside, self._out)


def interruptible() -> None:
    """SIGINT interrupts, also where whoever started us ignores it, as shells do in the background.

    ``timeout --signal=INT`` sends it when time is up.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Seconds:
    """What is left of a number of seconds."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self._end - time.monotonic()
