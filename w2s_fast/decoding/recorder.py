"""Recorders: what turns a function of tensors at fixed addresses into its recording.

A forward pass launches some hundred kernels, and a small batch is done with each of them sooner
than the host launches the next. Replayed as a CUDA graph a pass costs the host one launch, as in
vLLM and gpt-fast.

A capture that fails harms the whole process: torch 2.11 leaves the thread on the stream of the
capture, its allocator no longer frees what it has cached when memory runs out, and its generator
raises from then on. So what would make a capture fail is met before: a pass that waits for the
device raises in its rehearsal. Where a capture fails all the same, what it left behind is undone,
and no other is tried on that device.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

import torch

from w2s_fast.decoding.streams import own_stream


class Recorder(Protocol):
    """What turns a function of tensors at fixed addresses into its recording."""

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record what ``run`` does, and return what does it again. It may be run meanwhile."""
        ...


class NothingRecorded(Exception):
    """A capture has failed on this device before, and that was said."""


# The owner of two facts about this process: which devices a capture has failed on, by index, and
# that one is under way. torch allows no two at once.
_failed_on: set[int | None] = set()
_one_at_a_time = threading.Lock()


class CudaRecorder:
    """Records CUDA graphs that share one pool of memory: never replay two of them at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        # One for all: libraries keep a workspace for each stream they were ever used on.
        self._stream = own_stream(device, self)

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        """As a Recorder does; ``run`` is run twice before.

        Raises:
            NothingRecorded: nothing is recorded on this device any more.
            Exception: of ``run``, or of CUDA. The current stream is what it was.
        """
        with _one_at_a_time, torch.cuda.device(self._device):
            if self._device.index in _failed_on:
                raise NothingRecorded
            self._rehearse(run)
            return self._capture(run)

    def _rehearse(self, run: Callable[[], None]) -> None:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                # Kernels are compiled, and libraries set up. That may wait for the device, once.
                run()
                with _waiting_raises():
                    run()
        finally:
            current.wait_stream(self._stream)

    def _capture(self, run: Callable[[], None]) -> Callable[[], None]:
        current = torch.cuda.current_stream()
        graph = torch.cuda.CUDAGraph()
        # Other threads of the caller's program may use the device meanwhile.
        capture = torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        try:  # no `with`: its end would raise, in the place of what was raised within
            capture.__enter__()
            run()
            capture.__exit__(None, None, None)
        except BaseException as error:
            _failed_on.add(self._device.index)
            self._mend(graph, current)
            if not isinstance(error, Exception):
                raise
            why = f"{error}; from now on nothing is recorded on {self._device} in this process"
            raise RuntimeError(why) from error
        finally:
            torch.cuda.set_stream(current)
        return graph.replay

    def _mend(self, graph: torch.cuda.CUDAGraph, current: torch.cuda.Stream) -> None:
        """Undo what a capture that failed has left behind, wherever it was."""
        if torch.cuda.is_current_stream_capturing():
            with suppress(RuntimeError):  # that it was invalid
                graph.capture_end()
        torch.cuda.set_stream(current)
        with suppress(RuntimeError):  # it was told already, as later versions of torch do
            torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
        # torch 2.11 would take it for capturing, and raise wherever random numbers are drawn.
        generator = torch.cuda.default_generators[self._device.index or 0]
        generator.graphsafe_set_state(generator.clone_state())


@contextmanager
def _waiting_raises() -> Iterator[None]:
    """Within, whatever waits for the device raises. So it does in other threads of the process."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
