"""What all commands share: where words go, and how errors look."""

from __future__ import annotations

import errno
import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text
from typer.core import TyperGroup

from w2s_fast.errors import W2SFastError

PIPE_WIDTH = 100  # columns where there is no terminal to ask
READER_GONE = 128 + signal.SIGPIPE  # the exit code that a shell gives for it


_rank: int | None = None  # None: nobody else says the same

# What a write says where no file is at fault but its disk is.
_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Commands(TyperGroup):
    """Turns the package's errors, and files that cannot be opened or written, into one line and
    exit code 2; a reader of standard output that has gone away, into a quiet end.

    Every other exception is a bug and keeps its traceback.
    """

    def make_context(self, *args: Any, **options: Any) -> Any:
        if isinstance(sys.stdout, io.TextIOWrapper):  # there may be text that it cannot encode
            sys.stdout.reconfigure(errors="replace")
        with _errors_as_lines():  # where --help is answered
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        with _errors_as_lines():
            return super().invoke(ctx)


@contextmanager
def _errors_as_lines() -> Iterator[None]:
    try:
        yield
        return
    except W2SFastError as error:
        message = str(error)
    except OSError as error:
        if error.filename is not None:
            message = f"{error.filename}: {error.strerror}"
        elif error.errno == errno.EPIPE:
            _give_up_stdout()
            raise typer.Exit(READER_GONE) from None
        elif error.errno in _DISK_IS_FULL:
            _give_up_stdout()
            message = f"standard output: {error.strerror}; --resume goes on with an --output"
        else:
            raise
    _complain(" ".join(message.split()))
    raise typer.Exit(2)


def out_console(plain: bool = False) -> Console:
    """Standard output: results. `plain`: no colour and nothing that moves."""
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return Console(width=width, color_system=None if plain else "auto", highlight=False)


def note_console() -> Console:
    """Standard error: everything that is not a result."""
    return Console(stderr=True, highlight=False, quiet=_rank is not None)


def speak_as_rank(rank: int) -> None:
    """From here on this process, one of several that do the same, says only what goes wrong."""
    global _rank
    _rank = rank


def note(message: str, style: str = "dim") -> None:
    """One line on standard error, never wrapped, for people and for grep."""
    note_console().print(Text(message, style=style), soft_wrap=True)


def _complain(message: str) -> None:
    who = "" if _rank is None else f"rank {_rank}: "
    text = Text(f"{who}error: {message}", style="red")
    Console(stderr=True, highlight=False).print(text, soft_wrap=True)


def show_warnings_as_notes() -> None:
    """Warnings of the package itself, from here on: without the line of code that gives them."""
    before = warnings.showwarning

    def show(message: Any, category: Any, filename: str, *where: Any, **more: Any) -> None:
        if category is UserWarning and "w2s_fast" in filename:
            note(f"warning: {message}", style="yellow")
        else:
            before(message, category, filename, *where, **more)

    warnings.showwarning = show


def counting_bar(console: Console, width: int, hidden: bool) -> Progress:
    """For ``with``: bars that say how many of how many are done; taken away at the end.

    ``width``: of what their descriptions take.
    """
    return Progress(
        TextColumn(f"{{task.description:<{width}}}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=hidden,
    )


def _give_up_stdout() -> None:
    """So that the interpreter's last flush, of what could not be written, does not fail again."""
    with suppress(OSError, ValueError):  # it may be no file at all
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


@contextmanager
def loading(bars: bool) -> Iterator[None]:
    """Around the loading of models. With ``bars`` each says what it is, and transformers draws its
    bars (see :func:`quiet_transformers`); otherwise there is one sign of life, in a terminal."""
    if not bars:
        with note_console().status("loading models"):
            yield
        return
    told = logging.getLogger("w2s_fast.models")
    handler, level = _Notes(), told.level
    told.addHandler(handler)
    told.setLevel(logging.INFO)
    try:
        yield
    finally:
        told.removeHandler(handler)
        told.setLevel(level)


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


def quiet_transformers(bars: bool = False) -> None:
    """No advice, and no loading bars but with ``bars``. To be called before transformers is
    imported, which reads it.

    What the user has set in the environment stays.
    """
    if not bars:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
