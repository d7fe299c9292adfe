"""The device in name only, with a queue: a thread does its work, in order, when it gets to it.

On the CPU an operator is done when it returns, so code that looks at a result too early finds it
all the same. Here operators on the device's tensors are put into the queue, as are copies to it and
from it, and replays of recordings. What is read without being waited for is an error.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import w2s_fast.attention.outbox
from tests.support.device import _ALLOCATIONS, Device, _Calls, _key, _Operators, _tensors
from w2s_fast.attention.staging import Reading
from w2s_fast.decoding import Recorder

PATIENCE = 60  # seconds; only a test that fails needs them


class SlowDevice(Device):
    """For ``with``: as :class:`Device`, but the host is told before work is done.

    Attributes:
        before_replay: called by the device's thread before each replay: it may sleep, or wait.
        done: how many things of the queue have been done. put: how many were put there.
    """

    def __init__(self, before_replay: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.before_replay = before_replay
        self.put = self.done = 0
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._some_done = threading.Condition()
        self._failure: BaseException | None = None
        # Storages of the host that are read to, kept, and when what is read is there.
        self._arrives: dict[int, tuple[Any, int]] = {}

    def __enter__(self) -> SlowDevice:
        self._work = threading.Thread(target=self._do_work, daemon=True)
        self._work.start()
        self._patches = [
            mock.patch.object(Reading, "wait", self._waiting_for()),
            mock.patch.object(w2s_fast.attention.outbox, "mark_on", self._mark_on),
        ]
        for patch in self._patches:
            patch.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for patch in self._patches:
            patch.stop()
        self._queue.put(None)
        self._work.join(PATIENCE)

    def enqueue(self, work: Callable[[], Any]) -> int:
        """Let the device do something behind all else; its place in the queue, counted from 1."""
        self.put += 1
        self._queue.put(work)
        return self.put

    def wait_for(self, place: int | None = None) -> None:
        """Until the device has come that far; None: has done everything."""
        place = self.put if place is None else place
        with self._some_done:
            there = self._some_done.wait_for(
                lambda: self.done >= place or self._failure is not None, PATIENCE
            )
        if self._failure is not None:
            raise self._failure
        assert there, "the device never came that far"

    def recorder(self, record: Recorder) -> Recorder:
        """The same recorder, whose recordings are replayed by the device's thread."""

        def on_device(run: Callable[[], None]) -> Callable[[], None]:
            self.wait_for()
            with self._away():
                replay = record(run)

            def replayed() -> None:
                self.before_replay()
                replay()

            def later() -> None:
                self.counts.replays += 1
                self.enqueue(replayed)

            return later

        return on_device

    def _see(self) -> None:
        self._modes.enter_context(_Queued(self))
        self._modes.enter_context(_Calls(self))

    def _do_work(self) -> None:
        with torch.inference_mode():
            while (work := self._queue.get()) is not None:
                try:
                    if self._failure is None:
                        work()
                except BaseException as error:  # told to whoever waits
                    self._failure = error
                with self._some_done:
                    self.done += 1
                    self._some_done.notify_all()

    def _waiting_for(self) -> Callable[[Reading], list[Tensor]]:
        def wait(reading: Reading) -> list[Tensor]:
            self.counts.waits += 1
            for tensor in reading._here:
                self.wait_for(self._arrives[_key(tensor)][1])
            return reading._here

        return wait

    def _mark_on(self, _: torch.device) -> _Mark:
        return _Mark(self)

    def _arrives_with(self, tensor: Tensor, place: int) -> None:
        self._arrives[_key(tensor)] = tensor.untyped_storage(), place

    def _read(self, to: Tensor | None = None) -> None:
        super()._read(to)
        if to is None:
            self.wait_for()

    def _looked_at(self, tensor: Tensor) -> None:
        _, place = self._arrives.get(_key(tensor), (None, 0))
        assert self.done >= place, "the host looks at what has not arrived"


class _Mark:
    """A place in the queue."""

    def __init__(self, device: SlowDevice) -> None:
        self._device = device
        self._place = 0

    def record(self) -> None:
        self._place = self._device.put

    def query(self) -> bool:
        return self._device.done >= self._place


class _Queued(_Operators):
    """Operators that compute are put into the queue; what they will return is there at once."""

    _device: SlowDevice

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        device, given = self._device, _tensors((args, kwargs))
        on = [tensor for tensor in given if device.holds(tensor)]
        copied = device._born and func.overloadpacket is torch.ops.aten.clone
        if not (on or copied) or func.overloadpacket in _ALLOCATIONS:
            return super()._run(func, args, kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                return func.decompose(*args, **kwargs)
        returns = func._schema.returns
        if any(r.alias_info is not None and not r.alias_info.is_write for r in returns):
            return super()._run(func, args, kwargs)  # a view
        waits = device.counts.waits
        crosses = self._crosses(func, args, kwargs, given, on)
        tells = any("Tensor" not in str(r.type) for r in returns)  # a number, to the host
        if device.counts.waits > waits or tells:
            device.wait_for()
            out = func(*args, **kwargs)
            known = {_key(tensor) for tensor in given}
            if device._born or (on and device._born is None):
                device._take([t for t in _tensors(out) if _key(t) not in known])
            return out
        return self._put(func, args, kwargs, bool(on), crosses)

    def _put(self, func: Any, args: Any, kwargs: dict[str, Any], on: bool, crosses: bool) -> Any:
        device, schema = self._device, func._schema
        named = {a.name: value for a, value in zip(schema.arguments, args)} | kwargs
        written = {
            next(iter(a.alias_info.before_set)): named[a.name]
            for a in schema.arguments
            if a.alias_info is not None and a.alias_info.is_write and a.name in named
        }
        there, by_name = tree_map(_alias, args), tree_map(_alias, kwargs)
        if schema.returns and all(r.alias_info is not None for r in schema.returns):
            outs = [written[next(iter(r.alias_info.before_set))] for r in schema.returns]
            out = outs[0] if len(outs) == 1 else tuple(outs)
            place = device.enqueue(lambda: func(*there, **by_name))
        elif not schema.returns:
            out = None
            place = device.enqueue(lambda: func(*there, **by_name))
        else:
            shapes = func(*tree_map(_meta, args), **tree_map(_meta, kwargs))
            out = tree_map(_unknown, shapes)
            tensors = [_alias(tensor) for tensor in _tensors(out)]

            def run() -> None:
                found = _tensors(func(*there, **by_name))
                for to, own in zip(tensors, found, strict=True):
                    to.copy_(own)

            place = device.enqueue(run)
            if device._born or (on and device._born is None):
                device._take(out)
        device.counts.launches += not crosses
        for tensor in _tensors([out, list(written.values())]):
            if not device.holds(tensor):
                device._arrives_with(tensor, place)
        return out


def _alias(value: Any) -> Any:
    """The memory that a tensor has now, whatever becomes of the object: as a launch takes it."""
    return value.detach() if isinstance(value, Tensor) else value


def _meta(value: Any) -> Any:
    """A tensor without contents, and nothing else changed."""
    if isinstance(value, torch.device):
        return torch.device("meta")
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _unknown(value: Any) -> Any:
    """Memory for such a tensor, in which something wrong stands."""
    if not isinstance(value, Tensor):
        return value
    found = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    found.view(torch.uint8).fill_(255) if found.is_contiguous() and found.dim() else found.zero_()
    return found
