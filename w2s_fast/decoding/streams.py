"""CUDA streams of our own: which ones, and the one that all work of an engine runs on."""

from __future__ import annotations

import threading
from weakref import WeakSet

import torch

_MOST_TRIES = 32  # torch hands out so many streams of a device, in turn, again and again
_taken: WeakSet[torch.cuda.Stream] = WeakSet()
_taking = threading.Lock()


def own_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream that nobody else has taken from here and kept, as long as there is one.

    What somebody else launches on a stream while it is recorded becomes part of the recording.
    """
    with _taking:
        for _ in range(_MOST_TRIES):
            stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            if stream not in _taken:
                break
        _taken.add(stream)
        return stream


class HomeStream:
    """The stream that all work of an engine runs on, whatever thread and stream asks for it.

    So what one thread has launched comes before what another goes on with. To be used by one
    thread at a time. On a device without streams nothing happens.
    """

    def __init__(self, device: torch.device) -> None:
        """Its work comes after what the current stream has been given so far."""
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._before: tuple[int, torch.cuda.Stream] | None = None
        if device.type == "cuda":
            self._stream = own_stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def enter(self) -> None:
        """From here on this thread works at home, behind all that its own stream was given."""
        if self._stream is None:
            return
        before = torch.cuda.current_device(), torch.cuda.current_stream(self._device)
        self._stream.wait_stream(before[1])
        self._before = before
        torch.cuda.set_stream(self._stream)

    def leave(self) -> None:
        """Back to the thread's own stream, which waits for the work at home.

        May be interrupted, and called again.
        """
        if self._stream is None or self._before is None:
            return
        device, stream = self._before
        torch.cuda.set_stream(stream)
        torch.cuda.set_device(device)
        stream.wait_stream(self._stream)
        self._before = None
