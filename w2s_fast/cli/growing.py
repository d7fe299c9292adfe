"""A search as a terminal shows it: the text that is certain so far, and how far it has come.

What moves is taken away at the end; the answer itself is printed by whoever asked for it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

_REFRESHES = 8  # a second
_ROWS_BESIDE = 2  # of a terminal, that the text leaves free: what is said, and the cursor


class Growing:
    """For ``with``: a text that grows, and a line beneath it.

    The text is shown where standard output is a terminal, the line where standard error is one; in
    neither, nothing is.
    """

    def __init__(
        self, out: Console | None, notes: Console, say: Callable[[], str], prompt: str = ""
    ) -> None:
        """``out``: None: no text. ``say``: what the line says; asked again and again, from another
        thread."""
        shown = out is not None and out.is_terminal
        self._text = Text(printable(prompt), "dim") if shown else None
        self._say = say if notes.is_terminal else None
        self._console = out if out is not None and shown else notes
        self._live = Live(
            get_renderable=self._seen,
            console=self._console,
            refresh_per_second=_REFRESHES,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def add(self, text: str) -> None:
        """Append to the text. Nothing in it is obeyed by the terminal."""
        if self._text is not None:
            self._text.append(printable(text), "not dim")

    def note(self, message: str) -> None:
        """A line above what moves, that stays."""
        self._console.print(Text(message, "dim"), soft_wrap=True)

    def __enter__(self) -> Growing:
        if self._text is not None or self._say is not None:
            self._live.start(refresh=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def _seen(self) -> RenderableType:
        shown: list[RenderableType] = []
        if self._text:
            lines = self._text.copy().wrap(self._console, self._console.width)
            shown += lines[-max(1, self._console.height - _ROWS_BESIDE) :]
        if self._say is not None:
            shown.append(Text(self._say(), "dim", no_wrap=True, overflow="ellipsis"))
        return Group(*shown)


def printable(text: str) -> str:
    """A text without what a terminal would obey."""
    return text.replace("\x1b", "\N{REPLACEMENT CHARACTER}")
