"""How long a call takes on a device, and what the device itself can do in the same run.

On CUDA a call runs inside a graph, as it does in an engine: one graph walks over input sets that
together exceed the L2 cache, so that no call finds its input there, and is timed by events. What
Python takes to launch the call is a second number. On a CPU both are one, by the clock.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from w2s_fast.decoding import CudaRecorder

L2_BYTES = 64 * 2**20  # more than the L2 cache of any GPU this runs on
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Enough calls of a short kernel that neither the resolution of events nor a replay's launch shows;
# calls that are slow themselves need not be so many.
CALLS_A_WALK = 40
SECONDS_A_WALK = 4e-3
LAUNCHES = 20  # in a row, far from filling the device's queue


@dataclass(frozen=True)
class Timing:
    """How long a call takes.

    Attributes:
        device_s: median seconds of a call on the device; on a CPU, of the clock.
        host_s: median seconds that Python takes to launch a call, waiting for nothing; None on a
            CPU, where ``device_s`` holds all of it.
        not_recorded: why the calls were launched one by one, so that ``device_s`` may hold times
            in which the device waited for the host; empty where they were replayed.
    """

    device_s: float
    host_s: float | None = None
    not_recorded: str = ""


class Walk:
    """A call over all of its input sets, one after the other, ready to be timed again and again.

    Attributes:
        calls: of one walk.
        not_recorded: as in :class:`Timing`.
    """

    def __init__(self, call: Callable[[Any], object], inputs: Sequence[Any]) -> None:
        self._call, self._inputs = call, inputs
        self._cuda = torch.cuda.is_available()
        self.calls = len(inputs)
        self.not_recorded = ""
        self._run: Callable[[], object] = self._launch
        for item in inputs[:3]:  # compiles kernels, and lets the allocator find its sizes
            call(item)
        if self._cuda:
            self.calls *= self._turns()
            self._run = self._recorded()

    def seconds(self) -> float:
        """Seconds of a call in one walk: their mean."""
        if not self._cuda:
            begin = time.perf_counter()
            self._run()
            return (time.perf_counter() - begin) / self.calls
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._run()  # while the device is busy with it, the host launches what is timed
        start.record()
        self._run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / self.calls

    def host_seconds(self) -> float | None:
        """Seconds that Python takes to launch a call; None on a CPU."""
        if not self._cuda:
            return None
        found = []
        for _ in range(5):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for i in range(LAUNCHES):
                self._call(self._inputs[i % len(self._inputs)])
            found.append((time.perf_counter() - begin) / LAUNCHES)
        torch.cuda.synchronize()
        return statistics.median(found)

    def _turns(self) -> int:
        """How often a walk goes through all input sets."""
        torch.cuda.synchronize()
        begin = time.perf_counter()
        self._call(self._inputs[0])
        torch.cuda.synchronize()
        calls = min(CALLS_A_WALK, int(SECONDS_A_WALK / (time.perf_counter() - begin)))
        return max(1, calls // len(self._inputs))

    def _launch(self) -> None:
        for i in range(self.calls):
            self._call(self._inputs[i % len(self._inputs)])

    def _recorded(self) -> Callable[[], object]:
        """The walk as a graph, captured on a stream that waits for the inputs; or why not."""
        try:
            return CudaRecorder(torch.device("cuda", torch.cuda.current_device()))(self._launch)
        except Exception as error:
            self.not_recorded = f"{type(error).__name__}: {error}"[:200]
            return self._launch


def time_call(
    call: Callable[[Any], object], inputs: Sequence[Any], *, budget: float = 0.5, most: int = 50
) -> Timing:
    """How long ``call(inputs[i])`` takes.

    Args:
        inputs: input sets, taken in turn. They are made on the current stream.
        budget: seconds to spend, about; at least 5 walks are timed all the same.
        most: walks at most; a CPU's time says nothing about kernels, and is taken 5 times.
    """
    walk = Walk(call, inputs)
    first = walk.calls * walk.seconds()
    most = most if torch.cuda.is_available() else 5
    walks = max(5, min(most, int(budget / max(first, 1e-6) / 2)))
    device_s = statistics.median(walk.seconds() for _ in range(walks))
    return Timing(device_s, walk.host_seconds(), walk.not_recorded)


class ToldClock:
    """A clock that goes on by what it is told: for a timer whose times others have taken."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        """Seconds; only differences mean anything."""
        return self._now

    def add(self, seconds: float) -> None:
        self._now += seconds


def input_sets(bytes_per_set: int, most: int = 64) -> int:
    """How many input sets of this size it takes to leave the L2 cache behind."""
    return max(2, min(most, 2 * L2_BYTES // max(1, bytes_per_set) + 1))


def copy_bandwidth(device: torch.device, size: int = 2**30) -> float:
    """Bytes read and written by a second in a plain copy of ``size`` bytes."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / time_call(lambda _: target.copy_(source), [None]).device_s


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 8192) -> float:
    """Floating-point operations a second of a square matrix product."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / time_call(lambda _: a @ b, [None]).device_s


@dataclass(frozen=True)
class Limits:
    """What a device can do at most, as measured there.

    Attributes:
        copy: bytes read and written, a second.
        matmul: floating-point operations a second, by dtype.
    """

    copy: float
    matmul: dict[str, float]

    @classmethod
    def measure(
        cls,
        device: torch.device,
        size: int = 2**30,
        square: int = 8192,
        dtypes: Sequence[str] = tuple(DTYPES),
    ) -> Limits:
        """From a copy of ``size`` bytes and products of ``square`` rows and columns."""
        rates = {name: matmul_rate(device, DTYPES[name], square) for name in dtypes}
        return cls(copy_bandwidth(device, size), rates)


def commit() -> str | None:
    """The commit that is measured, for reports; ``-dirty`` if files differ from it."""
    try:
        return subprocess.check_output(
            ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, text=True
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        return None
