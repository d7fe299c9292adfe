"""Prompts and posts from files of the user's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from w2s_fast.errors import InvalidRequest


def read_prompts(path: Path) -> list[str]:
    """One a line: an object with a ``prompt`` in a file of JSON lines, else the line as it is.

    Raises:
        InvalidRequest: names the line that cannot be used; or the file has none.
    """
    if path.suffix in (".jsonl", ".json"):
        return [_text(path, number, row, "prompt") for number, row in read_json_lines(path)]
    lines = [line for line in _lines(path) if line.strip()]
    if not lines:
        raise InvalidRequest(f"{path} holds no prompts")
    return lines


def read_posts(path: Path, template: str) -> list[str]:
    """Prompts of a file of JSON lines: its ``prompt`` as it is, or its ``post`` in the template.

    Args:
        template: text with ``{post}`` in it.
    """
    if "{post}" not in template:
        raise InvalidRequest(f"--template is {template!r}; allowed: text with {{post}} in it")
    found = []
    for number, row in read_json_lines(path):
        if "prompt" in row:
            found.append(_text(path, number, row, "prompt"))
        else:
            found.append(template.replace("{post}", _text(path, number, row, "post")))
    return found


def read_json_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The objects of a file, each with the number of its line, from 1."""
    found = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InvalidRequest(f"{path}, line {number}: no JSON: {error}") from error
        if not isinstance(row, dict):
            raise InvalidRequest(f"{path}, line {number}: allowed: an object")
        found.append((number, row))
    if not found:
        raise InvalidRequest(f"{path} holds no lines")
    return found


def _lines(path: Path) -> list[str]:
    """Only a line feed ends one: JSON may hold what Unicode calls a line's end."""
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path} is not UTF-8: {error}") from error


def _text(path: Path, number: int, row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise InvalidRequest(f"{path}, line {number}: {key!r} must be a text that is not empty")
    return value
