"""Ranks of a command: the processes among which it divides the base.

The command is the first of them, and starts the others by itself: the same command, whose processes
follow. Where torchrun has started all of them, across machines say, none are started.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from w2s_fast.cli.console import note, speak_as_rank
from w2s_fast.errors import RankFailure

if TYPE_CHECKING:
    from w2s_fast import Engine

_HERE = "127.0.0.1"
_SECONDS = 20  # for the others to end by themselves


def follows(size: int) -> bool:
    """Whether this process is another one of so many than the first. From then on it says nothing
    but what goes wrong with itself."""
    rank = int(os.environ.get("RANK", 0)) if size > 1 else 0
    if rank > 0:
        speak_as_rank(rank)
    return rank > 0


def follow(load: Callable[..., Engine]) -> NoReturn:
    """Do what the first rank does, until it has no more use for this one.

    Raises:
        typer.Exit: always.
    """
    # Whoever stops all of them stops the first; what runs there is finished first.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    try:
        load(quiet=True).follow()
    except RankFailure:  # it is told by whoever has failed
        raise typer.Exit(1) from None
    raise typer.Exit(0)


class Others:
    """The other ranks of a command, which it has started; none where it is alone, or torchrun has
    started all of them."""

    def __init__(self, size: int) -> None:
        self.lost = False  # whether one has ended before its time
        self._together = self._over = False
        self._at_loss: Callable[[], None] = lambda: None
        self._started: list[subprocess.Popen[bytes]] = []
        if size > 1 and "RANK" not in os.environ:
            self._start(size)

    def ready(self, at_loss: Callable[[], None] = lambda: None) -> None:
        """All of them have come together; ``at_loss``: called, in another thread, where one ends.

        One that ends before that ends the command: the others wait for it.
        """
        self._together, self._at_loss = True, at_loss
        if self.lost:
            at_loss()

    def end(self) -> None:
        """Wait until they have ended, or see to it."""
        self._over = True
        for process in self._started:
            if not self._together:
                process.kill()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_SECONDS)
            process.kill()

    def _start(self, size: int) -> None:
        import torch.distributed

        distributed: Any = torch.distributed  # it says nothing of its stores to type checkers
        self._store = distributed.TCPStore(_HERE, 0, size, is_master=True, wait_for_workers=False)
        own = {
            "WORLD_SIZE": size,
            "LOCAL_WORLD_SIZE": size,
            "MASTER_ADDR": _HERE,
            "MASTER_PORT": self._store.port,
            # That nobody is to open a store at that port: it is there. As torchrun says it.
            "TORCHELASTIC_USE_AGENT_STORE": True,
            "TORCHELASTIC_RESTART_COUNT": 0,
        }
        os.environ.update({name: str(value) for name, value in own.items()})
        for rank in range(1, size):
            self._started.append(process := _start(rank))
            watch = partial(self._watch, rank, process)
            threading.Thread(target=watch, name=f"w2s-fast rank {rank}", daemon=True).start()
        os.environ.update({"RANK": "0", "LOCAL_RANK": "0"})

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        if self._over:
            return
        self.lost = True
        if not self._together:
            note(f"error: rank {rank} ended before all of them were ready", style="red")
            os._exit(2)
        self._at_loss()


@contextmanager
def others(size: int) -> Iterator[Others]:
    """For ``with``: the other ranks run."""
    found = Others(size)
    try:
        yield found
    finally:
        found.end()


@contextmanager
def led(size: int, load: Callable[[], Engine]) -> Iterator[Engine]:
    """For ``with``: an engine that the others follow; of one process it is that alone."""
    with others(size) as own:
        engine = load()
        own.ready()
        with engine.lead():
            yield engine


def _start(rank: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "w2s_fast.cli", *sys.argv[1:]],
        env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is the first one's
    )
