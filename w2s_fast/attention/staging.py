"""Staging: small tensors side by side in one buffer, filled by the host, for one copy to a device.

A launch or a copy costs the host some microseconds, whatever its size, and a pass needs a dozen
small tensors. So the host fills one buffer, and the tensors are views of its copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from w2s_fast._pages import fill_fields

ALIGNMENT = 16  # bytes; kernels may then load any field 16 bytes at a time
_NUMPY: dict[torch.dtype, np.dtype[Any]] = {
    torch.int32: np.dtype(np.int32),
    torch.int64: np.dtype(np.int64),
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
    torch.bool: np.dtype(np.bool_),
}
_TORCH = {array: tensor for tensor, array in _NUMPY.items()}


class Field(NamedTuple):
    """One tensor of a buffer. ``spare``: what stands where nothing was filled in."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    spare: float = 0


class Fields:
    """Where the tensors of a buffer lie: one behind the other, each at a multiple of 16 bytes.

    Attributes:
        offsets: in bytes, by name. nbytes: of the whole.
    """

    def __init__(self, fields: Mapping[str, Field], begin: int = 0) -> None:
        """``begin``: bytes to be left free before the first."""
        self._fields = dict(fields)
        self.offsets: dict[str, int] = {}
        self.nbytes = begin
        self._places: dict[str, tuple[int, int, bytes, str]] = {}
        for name, (dtype, shape, spare) in self._fields.items():
            self.offsets[name] = self.nbytes
            items = math.prod(shape)
            kind = _NUMPY[dtype]
            self._places[name] = (self.nbytes, items, kind.type(spare).tobytes(), kind.kind)
            self.nbytes += -(-items * dtype.itemsize // ALIGNMENT) * ALIGNMENT

    def offsets_of(self, names: Iterable[str]) -> NDArray[np.int64]:
        """In bytes, in this order."""
        return np.array([self.offsets[name] for name in names], np.int64)

    def tensors(self, buffer: Tensor) -> dict[str, Tensor]:
        """Views of a buffer uint8 [at least ``nbytes``]."""
        whole = {dtype: buffer.view(dtype) for dtype in {f.dtype for f in self._fields.values()}}
        views = {}
        for name, (dtype, shape, _) in self._fields.items():
            strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
            offset = buffer.storage_offset() + self.offsets[name]
            views[name] = whole[dtype].as_strided(shape, strides, offset // dtype.itemsize)
        return views

    def nothing(self, names: Iterable[str]) -> dict[str, NDArray[Any]]:
        """An empty value for each of these fields."""
        return {name: np.empty(0, _NUMPY[self._fields[name].dtype]) for name in names}

    def fill(self, buffer: NDArray[np.uint8], values: Mapping[str, NDArray[Any]]) -> None:
        """Put values first into the fields of these names, and what is spare behind them.

        ``buffer``: uint8 [at least ``nbytes``]; the values have one dimension and the dtype of
        their field.
        """
        fill_fields(buffer, [self._places[name] for name in values], list(values.values()))


def host_buffer(nbytes: int, device: torch.device) -> Tensor:
    """Memory of the host for one copy to ``device``: uint8 [nbytes].

    It may be dropped as soon as the copy is launched. For CUDA it is pinned, so that the copy waits
    for nothing: torch keeps a ring of such memory, and an event for each copy that left it, which
    it looks at before it gives the memory out again.
    """
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


def launch_copy(source: Tensor, target: Tensor) -> None:
    """Launch a copy from one side to the other, or on the device. Nobody waits for it."""
    target.copy_(source, non_blocking=True)


def brought(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device: itself where it lies there already.

    Nobody waits, but for copies to the host: who reads them there would come too soon.
    """
    to_host = device.type == "cpu" and tensor.device.type != "cpu"
    return tensor.to(device, non_blocking=not to_host)


def to_device(arrays: Mapping[str, NDArray[Any]], device: torch.device) -> dict[str, Tensor]:
    """Arrays of one dimension as tensors on a device, in one copy."""
    fields = Fields({name: Field(_TORCH[a.dtype], a.shape) for name, a in arrays.items()})
    here = host_buffer(fields.nbytes, device)
    fields.fill(here.numpy(), arrays)
    return fields.tensors(here.to(device, non_blocking=True))


class Columns:
    """Tensors of one dimension side by side in a buffer, for once.

    Attributes:
        offsets, items: int64, of each, in bytes and in items. nbytes: of the whole.
    """

    def __init__(self, columns: Sequence[tuple[str, str, int]]) -> None:
        """``columns``: name, dtype and items of each."""
        self._columns = [(name, getattr(torch, dtype)) for name, dtype, _ in columns]
        self.items = np.array([items for *_, items in columns], np.int64)
        sizes = np.array([dtype.itemsize for _, dtype in self._columns]) * self.items
        ends = np.cumsum(-(-sizes // ALIGNMENT) * ALIGNMENT, dtype=np.int64)
        self.offsets = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
        self.nbytes = int(ends[-1])

    def cut(self, buffer: Tensor) -> dict[str, Tensor]:
        """Views of a buffer uint8 [nbytes], whose own offset is 0."""
        whole = {dtype: buffer.view(dtype) for dtype in {dtype for _, dtype in self._columns}}
        return {
            name: whole[dtype].as_strided((count,), (1,), offset // dtype.itemsize)
            for (name, dtype), offset, count in zip(
                self._columns, self.offsets.tolist(), self.items.tolist()
            )
        }


class Reading:
    """Tensors of a device on their way to the host, which goes on meanwhile.

    What is launched later may overwrite them: it is their values now that arrive.
    """

    def __init__(self, *tensors: Tensor) -> None:
        """All of one device."""
        pinned = tensors[0].is_cuda
        self._arrived = None
        self._here = []
        for tensor in tensors:
            here = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
            launch_copy(tensor, here)
            self._here.append(here)
        if pinned:
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(tensors[0].device))

    def wait(self) -> list[Tensor]:
        """The tensors on the host, once they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._here


class Room:
    """Memory of a device that is used again and again, and grows: by one user after the other."""

    def __init__(self, device: torch.device) -> None:
        self._whole = torch.empty(0, dtype=torch.uint8, device=device)

    def take(self, nbytes: int) -> Tensor:
        """uint8 [nbytes]: the same memory as the last time, or new one where that was too small.

        Who holds the old one keeps it.
        """
        if nbytes > len(self._whole):
            size = 2 * nbytes  # what is to lie behind finds room, too
            self._whole = torch.empty(size, dtype=torch.uint8, device=self._whole.device)
        return self._whole[:nbytes]
