"""Instructions in and answers out, in the files that the package alpaca_eval reads."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from w2s_fast.demo import Method
from w2s_fast.errors import InvalidRequest
from w2s_fast.params import SearchParams


@dataclass(frozen=True)
class Instruction:
    """A row of alpaca_eval's set; ``dataset``: the part of it that the row is from, if it says."""

    instruction: str
    dataset: str | None = None


def alpaca_method(common: SearchParams) -> Method:
    """The paper's search for instructions."""
    params = replace(common, method="cbs", beam_width=2, successors=2, chunk_length=30)
    return Method("CBS W=2 K=2 L=30", params)


def read_instructions(path: Path) -> list[Instruction]:
    """A JSON list of objects with an ``instruction`` and, maybe, a ``dataset``.

    Raises:
        InvalidRequest: the file is something else.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidRequest(f"{path} is no JSON: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise InvalidRequest(f"{path}: allowed: a list of objects, not empty")
    found = []
    for number, row in enumerate(rows):
        text = row.get("instruction") if isinstance(row, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise InvalidRequest(f"{path}, entry {number}: allowed: an object with an instruction")
        dataset = row.get("dataset")
        found.append(Instruction(text, None if dataset is None else str(dataset)))
    return found


def alpaca_record(instruction: Instruction, output: str, generator: str) -> dict[str, Any]:
    """What alpaca_eval reads as a model's output."""
    record = {"instruction": instruction.instruction, "output": output, "generator": generator}
    return record | {"dataset": instruction.dataset or "unknown"}
