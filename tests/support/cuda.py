"""A stand-in for what recorders and streams call of ``torch.cuda``, with tensors on the CPU.

It behaves as torch 2.11 does where a capture fails: the graph's end raises before anything is put
back, neither in the allocator nor in the generator nor in the thread's current stream.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import pytest
import torch

from tests.support.no_host import NoHost
from tests.support.recorder import Log, Recording

DEVICE = torch.device("cuda", 0)
POOL_OF_STREAMS = 32
# Where a capture can be made to fail.
PLACES = ("synchronize", "begin", "begun", "body", "end")


class Stream:
    """No weak reference can be made to it: torch's streams are freed without clearing them."""

    __slots__ = ("_cuda", "device", "number")

    def __init__(self, cuda: Cuda, number: int, device: torch.device) -> None:
        self._cuda, self.number, self.device = cuda, number, device

    @property
    def cuda_stream(self) -> int:
        return self.number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and self.number == other.number

    def __hash__(self) -> int:
        return hash(self.number)

    def __repr__(self) -> str:
        return f"stream {self.number}"

    def wait_stream(self, other: Stream) -> None:
        assert self._cuda.capturing is None, "events of a capture are part of it"
        self._cuda.waits.append((self.number, other.number))


class Generator:
    """The default one of a device."""

    def __init__(self, capturing: bool = False) -> None:
        self.capturing = capturing

    def clone_state(self) -> Generator:
        return Generator()

    def graphsafe_set_state(self, other: Generator) -> None:
        self.capturing = other.capturing


class Cuda:
    """What the process knows of its GPUs.

    Attributes:
        fail_at: one of PLACES, where the next captures fail; None: they do not.
        failure: what is raised there.
        captures: how many were begun.
        capturing: the graph that is being captured.
        pools: those that the allocator takes for being captured into.
        waits: (who, for whom), numbers of streams.
    """

    def __init__(self) -> None:
        self.fail_at: str | None = None
        self.failure: Callable[[], BaseException] = lambda: RuntimeError("for the test")
        self.captures = 0
        self.capturing: Graph | None = None
        self.pools: set[Any] = set()
        self.waits: list[tuple[int, int]] = []
        self.generators = [Generator(), Generator()]
        self._thread = threading.local()
        self._numbers = count()
        self._pools = count(1)
        self._mode = 0
        self._no_host = NoHost()

    def fail(self, place: str) -> None:
        if self.fail_at == place:
            raise self.failure()

    # torch.cuda

    def stream_of(self, device: Any = None, priority: int = 0) -> Stream:
        return Stream(self, 1 + next(self._numbers) % POOL_OF_STREAMS, torch.device(device))

    def current_stream(self, device: Any = None) -> Stream:
        stream: Stream = getattr(self._thread, "stream", Stream(self, 0, DEVICE))
        return stream

    def set_stream(self, stream: Stream) -> None:
        self._thread.stream = stream

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before = self.current_stream()
        self.set_stream(stream)
        try:
            yield
        finally:
            self.set_stream(before)

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        yield

    def graph_pool_handle(self) -> tuple[int, int]:
        return (0, next(self._pools))

    def get_sync_debug_mode(self) -> int:
        return self._mode

    def set_sync_debug_mode(self, mode: int | str) -> None:
        mode = {"default": 0, "warn": 1, "error": 2}.get(mode, mode)  # type: ignore[arg-type]
        if 2 in (mode, self._mode) and mode != self._mode:
            (self._no_host.__enter__ if mode == 2 else self._leave_no_host)()
        self._mode = int(mode)

    def _leave_no_host(self) -> None:
        self._no_host.__exit__(None, None, None)

    def synchronize(self, device: Any = None) -> None:
        self.fail("synchronize")

    def is_current_stream_capturing(self) -> bool:
        return self.capturing is not None and self.current_stream() == self.capturing.stream

    # torch._C

    def end_allocate_to_pool(self, device: int, pool: Any) -> None:
        if pool not in self.pools:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.pools.remove(pool)


class Graph:
    """torch.cuda.CUDAGraph, on operator calls."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._log = Log()

    def capture_begin(self, pool: Any = None, **_: Any) -> None:
        cuda = self._cuda
        cuda.fail("begin")
        assert pool not in cuda.pools, "already recording to mempool_id"
        assert cuda.capturing is None, "one capture at a time"
        cuda.captures += 1
        cuda.pools.add(pool)
        cuda.generators[0].capturing = True
        cuda.capturing, self._pool, self.stream = self, pool, cuda.current_stream()
        self._log.__enter__()
        cuda.fail("begun")  # an interrupt that comes before the body is entered

    def capture_end(self) -> None:
        cuda = self._cuda
        self._log.__exit__(None, None, None)
        cuda.capturing = None
        if cuda.fail_at in ("begun", "body", "end"):
            raise RuntimeError("operation failed due to a previous error during capture")
        cuda.pools.remove(self._pool)
        cuda.generators[0].capturing = False
        self._recording = Recording.of(self._log.calls)

    def replay(self) -> None:
        self._recording()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """The stand-in in the place of ``torch.cuda``, in a process in which no capture has failed."""
    cuda = Cuda()
    names = ("current_stream", "set_stream", "stream", "device", "graph_pool_handle")
    names += ("get_sync_debug_mode", "set_sync_debug_mode", "is_current_stream_capturing")
    for name in (*names, "synchronize"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    monkeypatch.setattr(torch.cuda, "Stream", cuda.stream_of)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(cuda))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "default_generators", tuple(cuda.generators))
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", cuda.end_allocate_to_pool)
    monkeypatch.setattr("w2s_fast.decoding.recorder._failed_on", set())
    monkeypatch.setattr("w2s_fast.decoding.streams._taken", {})
    return cuda
