"""Streams on several CUDA devices, and which of these is the current one, on a stand-in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from w2s_fast.decoding import HomeStream, Lane
from w2s_fast.models.body import undisturbed

CPU, FIRST, SECOND = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)


class Stream:
    """Of a device; ``behind``: what it has waited for."""

    made = 0

    def __init__(self, device: torch.device) -> None:
        Stream.made += 1
        self.device, self.cuda_stream = device, Stream.made
        self.behind: list[Any] = []

    def wait_stream(self, other: Stream) -> None:
        assert other.device == self.device
        self.behind.append(other)


class Cuda:
    """Two devices, as one thread has them."""

    def __init__(self) -> None:
        self.current = 0
        self.streams = [Stream(FIRST), Stream(SECOND)]

    def set_stream(self, stream: Any) -> None:
        self.current = stream.device.index
        self.streams[self.current] = stream

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        device, before = self.current, self.streams[stream.device.index]
        self.set_stream(stream)
        yield
        self.set_stream(before)
        self.current = device

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device.index
        yield
        self.current = before


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    cuda = Cuda()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: cuda.current)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: cuda.streams[device.index])
    monkeypatch.setattr(torch.cuda, "set_stream", cuda.set_stream)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: setattr(cuda, "current", index))
    monkeypatch.setattr(torch.cuda, "stream", cuda.stream)
    monkeypatch.setattr(torch.cuda, "device", cuda.device)
    return cuda


def test_an_engine_is_at_home_on_each_of_its_devices(cuda: Cuda) -> None:
    """On one stream of each, whatever the thread's own ones are; and the base's is current."""
    home = HomeStream(SECOND, CPU, FIRST, SECOND)
    second, first = home._streams
    theirs = list(cuda.streams)
    home.enter()
    assert cuda.streams == [first, second] and cuda.current == 1
    assert first.behind[-1] is theirs[0] and second.behind[-1] is theirs[1]  # type: ignore[attr-defined]
    home.leave()
    home.leave()
    assert cuda.streams == theirs and cuda.current == 0
    assert [own.behind for own in theirs] == [[first], [second]]
    nowhere = HomeStream(CPU)
    nowhere.enter()
    nowhere.leave()
    assert cuda.streams == theirs


def test_what_runs_beside_does_so_on_each_device(cuda: Cuda) -> None:
    lane = Lane(FIRST, SECOND)
    before = list(cuda.streams)
    with lane.beside():
        assert cuda.streams == lane._streams and cuda.current == 0
    assert cuda.streams == before and cuda.current == 0
    assert [own.behind for own in lane._streams] == [[own] for own in before]  # type: ignore[attr-defined]
    lane.join()
    assert [own.behind for own in before] == [[own] for own in lane._streams]


def test_work_on_a_device_finds_it_the_current_one(cuda: Cuda) -> None:
    for device, current in ((SECOND, 1), (FIRST, 0), (CPU, 0)):
        with undisturbed(device):
            assert cuda.current == current
        assert cuda.current == 0
