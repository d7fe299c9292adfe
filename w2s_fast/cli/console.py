"""What all commands share: where words go, and how errors look."""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from w2s_fast.errors import W2SFastError

PIPE_WIDTH = 100  # columns where there is no terminal to ask


class Commands(TyperGroup):
    """Turns the package's errors, and files that cannot be opened, into one line and exit code 2.

    Every other exception is a bug and keeps its traceback.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except W2SFastError as error:
            message = str(error)
        except OSError as error:
            if error.filename is None or error.errno == errno.EPIPE:
                raise
            message = f"{error.filename}: {error.strerror}"
        note(f"error: {' '.join(message.split())}", style="red")
        raise typer.Exit(2)


def out_console(plain: bool = False) -> Console:
    """Standard output: results. `plain`: no colour and nothing that moves."""
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return Console(width=width, color_system=None if plain else "auto", highlight=False)


def note_console() -> Console:
    """Standard error: everything that is not a result."""
    return Console(stderr=True, highlight=False)


def note(message: str, style: str = "dim") -> None:
    """One line on standard error, never wrapped, for people and for grep."""
    note_console().print(Text(message, style=style), soft_wrap=True)


def quiet_transformers() -> None:
    """No loading bars and no advice. To be called before transformers is imported, which reads it.

    What the user has set in the environment stays.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
