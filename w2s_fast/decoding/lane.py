"""Lane: CUDA streams beside the current ones, for work that need not wait for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from w2s_fast.decoding.streams import own_stream


class Lane:
    """Work that runs beside what the current streams do next.

    Tensors may be passed in and out freely, as long as both sides of :meth:`beside` keep theirs
    until :meth:`join`: their memory is then given back where all its uses are in the past.
    """

    def __init__(self, *devices: torch.device) -> None:
        """A stream on each of these devices. On one without streams, work is done at once."""
        self._streams = [
            own_stream(device, self) for device in dict.fromkeys(devices) if device.type == "cuda"
        ]

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What is launched within begins after all that was launched before."""
        if not self._streams:
            yield
            return
        for stream in self._streams:
            stream.wait_stream(torch.cuda.current_stream(stream.device))
        with ExitStack() as stack:
            for stream in reversed(self._streams):  # the first one's device is the current one then
                stack.enter_context(torch.cuda.stream(stream))
            yield

    def join(self) -> None:
        """What is launched from now on waits for the work beside."""
        for stream in self._streams:
            torch.cuda.current_stream(stream.device).wait_stream(stream)
