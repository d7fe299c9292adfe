"""CUDA streams of our own: which ones, and those that all work of an engine runs on."""

from __future__ import annotations

import itertools
import threading
import weakref

import torch

_MOST_TRIES = 32  # torch hands out so many streams of a device, in turn, again and again
# By a number of each taking: CUDA's handle of the stream. Not a set of weak references to streams:
# torch frees a stream without clearing those, so that looking through them would end the process.
_taken: dict[int, int] = {}
_takings = itertools.count()
_taking = threading.Lock()


def own_stream(device: torch.device, owner: object) -> torch.cuda.Stream:
    """A stream that no other ``owner`` has as long as this one lives, if there is one left.

    What somebody else launches on a stream while it is recorded becomes part of the recording.
    """
    with _taking:
        for _ in range(_MOST_TRIES):
            stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            if stream.cuda_stream not in list(_taken.values()):
                break
        taking = next(_takings)
        _taken[taking] = stream.cuda_stream
        # May run in any thread, in the middle of anything: no lock.
        weakref.finalize(owner, _taken.pop, taking, None).atexit = False
        return stream


class HomeStream:
    """The stream that all work of an engine runs on, whatever thread and stream asks for it.

    So what one thread has launched comes before what another goes on with. To be used by one
    thread at a time. On a device without streams nothing happens; of several each has one.
    """

    def __init__(self, *devices: torch.device) -> None:
        """Its work comes after what the current streams have been given so far.

        ``devices``: that work runs on; the first CUDA device is the current one then.
        """
        self._streams = [
            own_stream(device, self) for device in dict.fromkeys(devices) if device.type == "cuda"
        ]
        self._before: tuple[int, list[torch.cuda.Stream]] | None = None
        for stream in self._streams:
            stream.wait_stream(torch.cuda.current_stream(stream.device))

    def enter(self) -> None:
        """From here on this thread works at home, behind all that its own streams were given."""
        if not self._streams:
            return
        theirs = [torch.cuda.current_stream(own.device) for own in self._streams]
        before = torch.cuda.current_device(), theirs
        for own, stream in zip(self._streams, theirs):
            own.wait_stream(stream)
        self._before = before
        for own in reversed(self._streams):
            torch.cuda.set_stream(own)

    def leave(self) -> None:
        """Back to the thread's own streams, which wait for the work at home.

        May be interrupted, and called again.
        """
        if self._before is None:
            return
        device, theirs = self._before
        for stream in theirs:
            torch.cuda.set_stream(stream)
        torch.cuda.set_device(device)
        for own, stream in zip(self._streams, theirs):
            stream.wait_stream(own)
        self._before = None
