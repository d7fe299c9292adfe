"""Recorders: what turns a function of tensors at fixed addresses into its recording.

A forward pass launches some hundred kernels, and a small batch is done with each of them sooner
than the host launches the next. Replayed as a CUDA graph a pass costs the host one launch, as in
vLLM and gpt-fast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch


class Recorder(Protocol):
    """What turns a function of tensors at fixed addresses into its recording."""

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record what ``run`` does, and return what does it again. It may be run meanwhile."""
        ...


class CudaRecorder:
    """Records CUDA graphs that share one pool of memory: never replay two of them at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        # One for all: libraries keep a workspace for each stream they were ever used on.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            # Kernels are compiled, and libraries set up, which must not happen in a recording.
            with torch.cuda.stream(self._stream):
                run()
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads of the caller's program may use the device meanwhile.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                run()
        return graph.replay
