"""Kernels compiled ahead of time, for GPUs that are not there, exactly as their launchers ask.

:func:`compilations` runs a launcher on meta tensors under a driver that only knows a target. Every
launch then compiles instead of running: the same specialisations, constants, warps and stages as
on a GPU, taken from the launcher itself. What comes back says how many registers a thread takes,
whether any are spilled, how much shared memory is used, and which instructions were chosen.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from w2s_fast.kernels import library

# Multiprocessors of the largest part, and the shared memory a program may have, in bytes (CUDA C++
# Programming Guide, technical specifications per compute capability).
SMS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 120: 188}
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}

_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Compilation:
    """One kernel, as a launch asked for it."""

    name: str
    arch: int
    grid: tuple[int, ...]
    num_warps: int
    num_stages: int
    shared: int  # bytes
    tensor_columns: int  # of the tensor memory that Blackwell has; 512 in a multiprocessor
    ptx: str
    cubin: bytes
    variant: str = ""  # the same for what a process compiles, or loads, but once

    @property
    def programs(self) -> int:
        return math.prod(self.grid)

    @cached_property
    def resources(self) -> dict[str, int]:
        """REG, STACK, LOCAL, SHARED of a thread or program, as cuobjdump has them."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            printed = subprocess.check_output(
                [str(_CUOBJDUMP), "--dump-resource-usage", file.name], text=True
            )
        line = next(x for x in printed.splitlines() if "REG:" in x)
        return {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}

    @property
    def registers(self) -> int:
        return self.resources["REG"]

    @property
    def spilled(self) -> int:
        """Bytes of stack or local memory a thread takes: 0 unless registers did not suffice."""
        return self.resources["STACK"] + self.resources["LOCAL"]

    @property
    def load_bytes(self) -> int:
        """What a thread loads at once from global memory: the most that is no exception, which
        brings a quarter at least of what its loads bring if each runs once."""
        loads = re.findall(r"\bld\.global[\w.:]*?(?:\.v(\d))?\.[busf](\d+)\b", self.ptx)
        sizes = Counter(int(count or 1) * int(bits) // 8 for count, bits in loads)
        sizes += Counter(
            int(size, 0)
            for size in re.findall(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?\], (\w+)", self.ptx)
        )
        least = sum(size * sizes[size] for size in sizes) / 4
        return max((size for size in sizes if size * sizes[size] >= least), default=0)

    def __str__(self) -> str:
        return (
            f"triton {triton.__version__}: "
            f"{self.name} sm_{self.arch} grid {self.grid} {self.num_warps} warps: "
            f"{self.registers} registers, {self.spilled} bytes spilled, {self.shared} shared"
        )


class _Driver:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch  # kernels are cached per device, so each target gets its own

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


@contextmanager
def _compiling(arch: int, done: list[Compilation]) -> Iterator[None]:
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        done.append(
            Compilation(
                name=kernel.metadata.name,
                arch=arch,
                grid=tuple(grid),
                num_warps=kernel.metadata.num_warps,
                num_stages=kernel.metadata.num_stages,
                shared=kernel.metadata.shared,
                tensor_columns=getattr(kernel.metadata, "tmem_size", None) or 0,
                ptx=kernel.asm["ptx"],
                cubin=kernel.asm["cubin"],
                variant=kernel.metadata.hash,
            )
        )
        return kernel

    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(driver, "_active", _Driver(arch)),
        mock.patch.object(library, "STAND_IN", library.Gpu(arch, SMS[arch])),
    ):
        yield


def built(path: Path, arch: int, name: str, grid: tuple[int, ...], num_warps: int) -> Compilation:
    """A kernel of a library that nvcc has built, as a launch asks for it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(_CUOBJDUMP), "--extract-elf", "all", str(path.resolve())]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        found = [file.read_bytes() for file in Path(folder).glob(f"*.sm_{arch}.cubin")]
    cubin = next(code for code in found if name.encode() in code)
    return Compilation(
        name, arch, grid, num_warps, 1, shared=0, tensor_columns=0, ptx="", cubin=cubin
    )


def compilations(arch: int, launcher: Callable[[], object]) -> list[Compilation]:
    """What ``launcher``, called on meta tensors, launches on a GPU of capability ``arch``."""
    done: list[Compilation] = []
    with _compiling(arch, done):
        launcher()
    return done
