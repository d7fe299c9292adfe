"""The `w2s-fast` command in this process, and its files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from w2s_fast.cli import app
from w2s_fast.demo import DemoModels

SMALL = ["--max-new-tokens", "10", "--dtype", "float64"]


def named(models: DemoModels) -> list[str]:
    return [
        *("--base", str(models.base)),
        *("--tuned", str(models.tuned)),
        *("--untuned", str(models.untuned)),
    ]


def run(*arguments: str | Path, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def records(path: Path) -> list[dict[str, Any]]:
    """Every line of an output, by index."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted(found, key=lambda record: record["index"])


def write_lines(path: Path, lines: Sequence[str]) -> Path:
    path.write_text("".join(line + "\n" for line in lines))
    return path
