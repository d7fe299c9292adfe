"""Lane: a CUDA stream beside the current one, for work that need not wait for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from w2s_fast.decoding.streams import own_stream


class Lane:
    """Work that runs beside what the current stream does next.

    Tensors may be passed in and out freely, as long as both sides of :meth:`beside` keep theirs
    until :meth:`join`: their memory is then given back where all its uses are in the past.
    """

    def __init__(self, device: torch.device) -> None:
        """On a device without streams, work is done at once."""
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = own_stream(device, self)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What is launched within begins after all that was launched before."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """What is launched from now on waits for the work beside."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
