"""News: wakes those who wait for something to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TypeAlias

Bell: TypeAlias = "SimpleQueue[None]"


class News:
    """What may bring those who wait for work further is told here, from any thread.

    Nobody who tells waits for a lock, so it may be done where generators are closed, and by whoever
    interrupted somebody that tells.
    """

    def __init__(self) -> None:
        self._bells: set[Bell] = set()

    @contextmanager
    def heard(self) -> Iterator[Bell]:
        """For ``with``: whatever is told meanwhile rings this bell; ``get`` waits for that.

        Who looks whether there is something to do does it in here, so that nothing is missed.
        """
        bell: Bell = SimpleQueue()
        try:
            self._bells.add(bell)
            yield bell
        finally:
            self._bells.discard(bell)

    def tell(self) -> None:
        """There is something new."""
        for bell in list(self._bells):
            bell.put(None)
