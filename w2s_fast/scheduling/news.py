"""News: wakes those who wait for something to do."""

from __future__ import annotations

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

    def heard(self) -> _Heard:
        """For ``with``: whatever is told meanwhile rings this bell; ``get`` waits for that.

        Who looks whether there is something to do does it in here, so that nothing is missed.
        """
        return _Heard(self._bells)

    def tell(self) -> None:
        """There is something new."""
        for bell in list(self._bells):
            bell.put(None)


class _Heard:
    """A bell that hangs with the others for a block, whatever interrupts it."""

    __slots__ = ("_bell", "_bells")

    def __init__(self, bells: set[Bell]) -> None:
        self._bells = bells
        self._bell: Bell = SimpleQueue()

    def __enter__(self) -> Bell:
        self._bells.add(self._bell)
        return self._bell

    def __exit__(self, *error: object) -> None:
        self._bells.discard(self._bell)

    def __del__(self) -> None:  # where it was interrupted before the block began
        self._bells.discard(self._bell)
