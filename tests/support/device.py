"""A device in name only: the CPU's memory, in which tensors of a device are told from the host's.

Whether code waits for its device, and how often it copies to it, cannot be seen where host and
device are one. Here a tensor is on the device where it was asked for there, or came of one that
is. Everything else is the host's. Where CUDA would refuse to compute with both, so does this.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.no_host import WAITING
from w2s_fast.decoding import Recorder

DEVICE = torch.device("cpu", 1)  # the CPU calls itself "cpu", without a number

aten = torch.ops.aten
_DEVICE_OF = Tensor.device.__get__  # type: ignore[attr-defined]
_FROM_DATA = {"tensor", "as_tensor", "asarray", "new_tensor"}
_ALLOCATIONS = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty}


@dataclass
class Counts:
    """What the host had to do with the device.

    Attributes:
        reads: copies from the device to the host.
        copies: copies from the host to the device.
        waits: how often the host stood still until the device had come that far: for reads and
            copies that block, and once for all reads before that do not.
        replays: of recordings.
        launches: operators that compute something, one of this package counted as one. What is in
            a recording does not count.
        places: which line read or copied, how often.
    """

    reads: int = 0
    copies: int = 0
    waits: int = 0
    replays: int = 0
    launches: int = 0
    places: Counter[str] = field(default_factory=Counter)

    @classmethod
    def largest(cls, found: Sequence[Counts]) -> Counts:
        """Of each number the largest, of several counts."""
        numbers = ("reads", "copies", "waits", "replays", "launches")
        places: Counter[str] = Counter()
        for counts in found:
            places |= counts.places
        return cls(*(max(getattr(c, name) for c in found) for name in numbers), places)


class Device:
    """For ``with``: :data:`DEVICE` exists, in this thread. Engines are made and run within.

    Attributes:
        counts: since the device exists, or since :meth:`counting` began.
    """

    def __init__(self) -> None:
        self.counts = Counts()
        # Kept, so that no other storage is ever taken for one of them.
        self._storages: dict[int, Any] = {}
        self._pending: dict[int, Any] = {}  # of the host, that reads are on their way to
        self._born: bool | None = None  # where new storages belong; None: with what they come from
        self._modes = ExitStack()

    def __enter__(self) -> Device:
        self._see()
        return self

    def __exit__(self, *error: Any) -> None:
        self._modes.close()

    @contextmanager
    def counting(self) -> Iterator[Counts]:
        """What happens within. Reads under way at the end have been waited for, if late."""
        self._pending.clear()
        self.counts = counts = Counts()
        yield counts
        counts.waits += bool(self._pending)
        self._pending.clear()

    def recorder(self, record: Recorder) -> Recorder:
        """The same recorder, whose recordings are on this device."""

        def on_device(run: Callable[[], None]) -> Callable[[], None]:
            with self._away():
                replay = record(run)

            def counted() -> None:
                self.counts.replays += 1
                with self._away():
                    replay()

            return counted

        return on_device

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is on the device."""
        return _key(tensor) in self._storages

    def _take(self, tree: Any) -> None:
        for tensor in _tensors(tree):
            self._storages[_key(tensor)] = tensor.untyped_storage()

    def _bearing(self, born: bool | None, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Call a function whose new storages belong there."""
        before, self._born = self._born, born
        try:
            return func(*args, **kwargs)
        finally:
            self._born = before

    @contextmanager
    def _away(self) -> Iterator[None]:
        """Nothing is seen within: in a recording everything is on the device."""
        self._modes.close()
        try:
            yield
        finally:
            self._see()

    def _see(self) -> None:
        """From here on what this thread does is seen."""
        self._modes.enter_context(_Operators(self))
        self._modes.enter_context(_Calls(self))

    def _copied(self, blocks: bool) -> None:
        self.counts.copies += 1
        self.counts.waits += blocks
        self.counts.places[f"copy {_place()}"] += 1

    def _read(self, to: Tensor | None = None) -> None:
        """``to``: where a read that does not block will arrive."""
        self.counts.reads += 1
        self.counts.places[f"read {_place()}"] += 1
        if to is None:
            self.counts.waits += 1
        else:
            self._pending[_key(to)] = to.untyped_storage()

    def _looked_at(self, tensor: Tensor) -> None:
        """The host looks at a tensor of its own: then all that was under way has arrived."""
        if _key(tensor) in self._pending:
            self.counts.waits += 1
            self._pending.clear()


class _Calls(TorchFunctionMode):
    """What Python asks of torch: here a device is still named, and lists are made of tensors."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        device, kwargs, name = self._device, kwargs or {}, func.__name__
        if func == _DEVICE_OF:
            return DEVICE if device.holds(args[0]) else func(*args)
        if name == "_parse_to":  # of Module.to: only looks at its arguments
            return func(*args, **kwargs)
        if name in ("tolist", "numpy", "__array__"):
            return self._look(func, name, args, kwargs)
        if name in ("to", "cpu"):
            return self._move(func, name, args, kwargs)
        named = kwargs.get("device")
        born = any(device.holds(tensor) for tensor in _tensors((args, kwargs))) or None
        if named is not None:
            born = torch.device(named) == DEVICE
            kwargs = {**kwargs, "device": "cpu"}
        out = device._bearing(born, func, args, kwargs)
        if born and name in _FROM_DATA:
            device._copied(blocks=True)
            device._take(out)
        return out

    def _look(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        tensor = args[0]
        if self._device.holds(tensor):
            if name != "tolist":
                raise AssertionError(f"{name} of a tensor on the device")
            self._device._read()
        else:
            self._device._looked_at(tensor)
        return func(*args, **kwargs)

    def _move(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        device, tensor = self._device, args[0]
        target, args, kwargs = _target(name, args, kwargs)
        there = DEVICE if isinstance(target, Tensor) and device.holds(target) else target
        if isinstance(there, Tensor):
            there = torch.device("cpu")
        here = device.holds(tensor)
        goes = here if there is None else torch.device(there) == DEVICE
        out: Tensor = device._bearing(goes, func, args, kwargs)
        if goes == here:
            return out
        if _key(out) == _key(tensor):
            launches = device.counts.launches
            out = device._bearing(goes, Tensor.clone, (out,), {})
            device.counts.launches = launches  # it stands for the copy
        blocks = not kwargs.get("non_blocking", False)
        if goes:
            device._copied(blocks)
            device._take(out)
        else:
            device._read(None if blocks else out)
        return out


class _Operators(TorchDispatchMode):
    """What torch launches: here tensors are told apart by where they came from."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunction():
            return self._run(func, args, kwargs or {})

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        device, given = self._device, _tensors((args, kwargs))
        on = [tensor for tensor in given if device.holds(tensor)]
        crosses = self._crosses(func, args, kwargs, given, on)
        out = func(*args, **kwargs)
        known = {_key(tensor) for tensor in given}
        new = [tensor for tensor in _tensors(out) if _key(tensor) not in known]
        if device._born or (on and device._born is None):
            device._take(new)
            launches = new and func.overloadpacket not in _ALLOCATIONS
            device.counts.launches += bool(launches or func._schema.is_mutable) and not crosses
        return out

    def _crosses(
        self, func: Any, args: Any, kwargs: dict[str, Any], given: list[Tensor], on: list[Tensor]
    ) -> bool:
        """Whether the operator itself copies from one side to the other; noted, if so."""
        device, packet = self._device, func.overloadpacket
        if packet is aten.copy_ and args[1].dim() > 0:
            to, source = (device.holds(tensor) for tensor in args[:2])
            blocks = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            if to and not source:
                device._copied(blocks)
            elif source and not to:
                device._read(None if blocks else args[0])
            return to != source
        if packet in (aten.index, aten.index_put, aten.index_put_) and device.holds(args[0]):
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                device._read()
            for index in indices:
                if not device.holds(index):
                    device._copied(blocks=True)
            return False
        if packet in WAITING and not kwargs.get("output_size"):
            if on:
                device._read()
            elif given:
                device._looked_at(given[0])
            return bool(on)
        if on and any(tensor.dim() > 0 and not device.holds(tensor) for tensor in given):
            raise AssertionError(f"{func} of tensors on the device and on the host")
        return False


def _target(name: str, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """Where ``Tensor.to`` or ``Tensor.cpu`` copies to, and its arguments without a number.

    A tensor for "where that one is"; None: it stays where it is.
    """
    if name == "cpu":
        return torch.device("cpu"), args, kwargs
    if kwargs.get("device") is not None:
        return kwargs["device"], args, {**kwargs, "device": "cpu"}
    if len(args) > 1 and isinstance(args[1], (str, torch.device)):
        return args[1], (args[0], "cpu", *args[2:]), kwargs
    other = args[1] if len(args) > 1 else kwargs.get("other")
    return (other if isinstance(other, Tensor) else None), args, kwargs


def _place() -> str:
    """The line of the package that called torch."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        file = frame.f_code.co_filename
        if "/w2s_fast/" in file or "/kernels/" in file:
            return f"{'/'.join(file.split('/')[-2:])}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def _tensors(tree: Any) -> list[Tensor]:
    """All tensors in tuples, lists and dicts."""
    if isinstance(tree, Tensor):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree
    if not isinstance(tree, (dict, tuple, list)):
        return []
    return [tensor for part in parts for tensor in _tensors(part)]


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
