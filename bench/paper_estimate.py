"""How long a launch should take, by what the compiler says of its kernel. Nothing is measured.

A launch takes the longer of two times:

    its limit      bytes / copy bandwidth, or operations / rate of products. Programs are whole: the
                   busiest multiprocessor has ceil(programs / multiprocessors) of them.
    its latency    A multiprocessor holds so many programs at once, and the others follow in waves.
                   Of each wave the longest program counts: the loads that it waits for, one after
                   the other, and what its warps exchange.

On top of it comes what any launch costs. Caches, clocks, and how instructions are scheduled are
left out: it says what a change of a kernel is worth, not what a device will show.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from bench.aot import SMS, Compilation

# What one multiprocessor has, of compute capability 9.0 and 10.0 alike (CUDA C++ Programming Guide,
# technical specifications per compute capability; CUDA occupancy calculator).
_WARPS, _PROGRAMS = 64, 32
_QUARTERS, _REGISTERS_OF_QUARTER, _REGISTER_UNIT = 4, 16384, 256  # a warp stands in one quarter
_SHARED, _SHARED_UNIT, _SHARED_RESERVED = 233472, 128, 1024  # bytes; reserved for each program
_TENSOR_COLUMNS = 512
ARCHITECTURES = (90, 100)


class Machine(NamedTuple):
    """What times are made of.

    Attributes:
        copy, product: bytes read and written, and operations of products, in a second: measured on
            an H200, in bfloat16.
        launch, wait, exchange: seconds that a launch within a graph takes, that a program waits for
            a load, and that a sum over its warps takes. Assumed.
    """

    copy: float = 4.3e12
    product: float = 790e12
    launch: float = 2e-6
    wait: float = 0.6e-6
    exchange: float = 0.13e-6


class Programs(NamedTuple):
    """Equal programs of a launch.

    Attributes:
        waits: loads that each waits for, one after the other.
        trips: of a pipelined loop, whose loads are under way for all stages but one.
        exchanges: sums over its warps, one after the other.
        count: how many there are; None: all.
    """

    waits: int
    trips: int = 0
    exchanges: int = 0
    count: int | None = None


@dataclass(frozen=True)
class Work:
    """What a launch does.

    Attributes:
        moved: bytes that it reads and writes. flop: operations of products.
        programs: those that have something to do. All others look, and return.
    """

    moved: int
    programs: list[Programs] = field(default_factory=list)
    flop: int = 0


class Estimate(NamedTuple):
    """Of one launch: programs a multiprocessor, programs without work, and times in seconds."""

    resident: int
    idle: int
    limit: float
    seconds: float


def resident(compiled: Compilation) -> int:
    """Programs that a multiprocessor holds at once."""
    of_warp = _round_up(compiled.registers * 32, _REGISTER_UNIT)
    warps = min(_WARPS, _QUARTERS * (_REGISTERS_OF_QUARTER // of_warp))
    shared = _round_up(compiled.shared, _SHARED_UNIT) + _SHARED_RESERVED
    columns = max(1, compiled.tensor_columns)
    return min(
        _PROGRAMS, warps // compiled.num_warps, _SHARED // shared, _TENSOR_COLUMNS // columns
    )


def limit(moved: int, flop: int, machine: Machine) -> float:
    """Seconds that so many bytes and operations take at least."""
    return max(moved / machine.copy, flop / machine.product)


def estimate(compiled: Compilation, work: Work, machine: Machine) -> Estimate:
    held, sms = resident(compiled), SMS[compiled.arch]
    counts = [compiled.programs if p.count is None else p.count for p in work.programs]
    busy = sum(counts)
    idle = compiled.programs - busy
    assert held >= 1 and busy >= 1 and idle >= 0, str(compiled)
    least = limit(work.moved, work.flop, machine)
    uneven = -(-busy // sms) * sms / busy
    latency = sum(
        _waves(count, held * sms) * _chain(programs, compiled.num_stages, machine)
        for count, programs in zip(counts, work.programs)
    )
    seconds = machine.launch + max(least * uneven, latency)
    seconds += _waves(idle, held * sms) * machine.wait
    return Estimate(held, idle, least, seconds)


def _chain(programs: Programs, stages: int, machine: Machine) -> float:
    waits = programs.waits + math.ceil(programs.trips / max(1, stages - 1))
    return waits * machine.wait + programs.exchanges * machine.exchange


def _waves(programs: int, at_once: int) -> int:
    return -(-programs // at_once)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
