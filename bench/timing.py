"""How long a call takes on a device, and what the device itself can do in the same run.

On CUDA a call is timed with events over a list of input sets that together exceed the L2 cache, so
that no call finds its input there; the result is the median. On a CPU the clock is the host's: that
serves dry runs, and says nothing about kernels.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

L2_BYTES = 64 * 2**20  # more than the L2 cache of any GPU this runs on


def input_sets(bytes_per_set: int, most: int = 64) -> int:
    """How many input sets of this size it takes to leave the L2 cache behind."""
    return max(2, min(most, 2 * L2_BYTES // max(1, bytes_per_set) + 1))


def median_seconds(
    call: Callable[[Any], object], inputs: Sequence[Any], *, budget: float = 1.0, most: int = 200
) -> float:
    """The median time of ``call(inputs[i])``, in seconds.

    Args:
        inputs: input sets, taken in turn.
        budget: seconds to spend, about; at least 5 calls are made all the same.
        most: calls at most.
    """
    cuda = torch.cuda.is_available()
    for item in inputs[:3]:  # compiles kernels, and lets the allocator find its sizes
        call(item)
    first = _one(call, inputs[0], cuda)
    most = most if cuda else 5  # a time that says nothing need not be exact
    count = max(5, min(most, int(budget / max(first, 1e-6))))
    if not cuda:
        return statistics.median(_one(call, inputs[i % len(inputs)], cuda) for i in range(count))
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(count)
    ]
    torch.cuda.synchronize()
    for i, (start, end) in enumerate(events):
        start.record()
        call(inputs[i % len(inputs)])
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def graph_seconds(call: Callable[[Any], object], item: Any, *, replays: int = 50) -> float:
    """The median time of a call inside a CUDA graph of 20: without the host's launch time."""
    if not torch.cuda.is_available():
        return median_seconds(call, [item])
    inner = 20
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call(item)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(inner):
            call(item)
    return median_seconds(lambda _: graph.replay(), [None], most=replays) / inner


def copy_bandwidth(device: torch.device, size: int = 2**30) -> float:
    """Bytes read and written by a second in a plain copy of ``size`` bytes."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / median_seconds(lambda _: target.copy_(source), [None], most=50)


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 8192) -> float:
    """Floating-point operations a second of a square matrix product."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda _: a @ b, [None], most=50)


def _one(call: Callable[[Any], object], item: Any, cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    call(item)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def commit() -> str | None:
    """The commit that is measured, for reports; ``-dirty`` if files differ from it."""
    try:
        return subprocess.check_output(
            ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, text=True
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        return None
