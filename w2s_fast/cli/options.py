"""How options are declared, and values with one entry a round."""

from __future__ import annotations

from typing import Any

import typer

FILES, PROMPTS, MODELS, REMOTE = "Files", "Prompts", "Models", "Remote base"
SEARCH, SAMPLING, MACHINE = "Search", "Sampling", "Machine"


def option(*names: str, help: str, panel: str, **more: Any) -> typer.models.OptionInfo:
    found: typer.models.OptionInfo = typer.Option(*names, help=help, rich_help_panel=panel, **more)
    return found


def width(text: str) -> int | list[int]:
    found: int | list[int] = _by_round(text, "a number")
    return found


def chunk_length(text: str) -> int | list[int | None] | None:
    what = "a number of tokens, or none (whole)"
    found: int | list[int | None] | None = _by_round(text, what, ("none", "0"))
    return found


def _by_round(text: str, what: str, words: tuple[str, ...] = ()) -> Any:
    """A number, or several with commas between, one a round; ``words`` stand for None."""
    try:
        parts = [part.strip().lower() for part in text.split(",")]
        values = [None if part in words else int(part) for part in parts]
    except ValueError:
        raise typer.BadParameter(f"{text!r}: {what}; or several, as 8,4,2") from None
    return values if len(values) > 1 else values[0]
