"""Rows of a report, written as they come, and the seconds there are for them."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.reports import save


class Rows:
    """Rows that are kept, whatever comes after them, and what is said of all of them.

    Attributes:
        kept: so far; dataclasses.
    """

    def __init__(self, out: Path | None, said: dict[str, Any]) -> None:
        """``out``: a JSON file; None: nothing is written."""
        self._out = out
        self._said = said
        self.kept: list[Any] = []
        self._save()

    def add(self, row: Any) -> None:
        self.kept.append(row)
        self._save()

    def say(self, **more: Any) -> None:
        """Of all rows."""
        self._said = {**self._said, **more}
        self._save()

    def end(self) -> None:
        """No others follow."""
        self._save(complete=True)

    def _save(self, complete: bool = False) -> None:
        report = {**self._said, "rows": [asdict(row) for row in self.kept]}
        save(self._out, report, complete=complete)


class Seconds:
    """What is left of a number of seconds."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self._end - time.monotonic()
