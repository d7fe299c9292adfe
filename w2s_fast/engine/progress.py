"""The progress bar of a batch: on standard error, and only if that is a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(total: int | None, *, show: bool = True) -> Iterator[Callable[[int], None]]:
    """Show how many requests have ended, and how many tokens of answers came in a second.

    Args:
        total: of requests; None: nobody knows. Nothing is shown for a single one.

    Yields:
        What is to be called with the tokens of each result.
    """
    if not show or total in (0, 1) or sys.stderr is None or not sys.stderr.isatty():
        yield lambda tokens: None
        return
    # Here, not above: most engines never show a bar.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    console = Console(stderr=True)
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("", total=total)
        begin = time.perf_counter()
        tokens = 0

        def advance(more: int) -> None:
            nonlocal tokens
            tokens += more
            speed = tokens / (time.perf_counter() - begin)
            progress.update(task, advance=1, description=f"{speed:.0f} tokens/s")

        yield advance
