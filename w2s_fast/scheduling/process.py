"""OwnProcess: an engine serves the process that made it, and says so in any other."""

from __future__ import annotations

import os

from w2s_fast.errors import EngineFailure


class OwnProcess:
    """The process that this object was made in.

    A child by `os.fork` has a copy of an engine, but none of its threads: a lock that one of them
    held stays locked for ever, the pools of torch and of tokenizers wait for workers that are not
    there, and CUDA does not work at all. So nothing is tried there.
    """

    def __init__(self) -> None:
        self._id = os.getpid()

    @property
    def is_here(self) -> bool:
        """Whether this is that process."""
        return os.getpid() == self._id

    def check(self) -> None:
        """EngineFailure in any other process; it says what to do."""
        if not self.is_here:
            raise EngineFailure(
                f"the engine was made in process {self._id}, and this is {os.getpid()}: a child by "
                "os.fork has none of its threads; make an engine in the child, or start children "
                "with multiprocessing's 'spawn' before"
            )
