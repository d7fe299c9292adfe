"""Source: where samples come from, a server or a recording of one."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol

from w2s_fast.remote.drawing import Drawing
from w2s_fast.remote.prompt import RemotePrompt


class Source(Protocol):
    """Draws samples for many searches at once.

    Attributes:
        about: in a line, for people: which model, where, and by which route.
    """

    @property
    def about(self) -> str: ...

    def accepts(self, prompt: object) -> str | None:
        """Why prompts of this kind, texts or messages, cannot be sent; None: they can."""
        ...

    def lacks(self, names: Collection[str]) -> set[str]:
        """Those of these fields of sampling that cannot be had."""
        ...

    def draw(self, prompt: RemotePrompt, drawing: Drawing, told: Callable[[], None]) -> None:
        """Have a drawing filled in; ``told`` is called then, in any thread. Returns at once."""
        ...

    def keep_only(self, drawings: Collection[Drawing]) -> None:
        """Cancel all others that are under way."""
        ...
