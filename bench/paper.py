"""Every kernel on paper: what the compiler says of it, and how long it should take for it.

    python -m bench.paper                                 every kernel, for sm_90 and sm_100
    python -m bench.paper --only token_logprob --arch 90
    python -m bench.paper --out paper.json                the same as JSON
    python -m bench.paper --copy 7.0 --product 2000       of another device, TB/s and TFLOP/s

No device is needed: kernels are compiled ahead of time (``aot.py``) at the shapes of
``paper_cases.py``, and times follow from the report (``paper_estimate.py``). They are estimates,
good for comparing one version of a kernel with the next. An operator's limit is that of the bytes
and operations that its result takes, and its share how much of the time that would be. The rates
are those of an H200 for both architectures, if no others are given.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from bench.aot import Compilation
from bench.paper_cases import Case, cases
from bench.paper_estimate import ARCHITECTURES, Machine, estimate, limit
from bench.timing import commit
from w2s_fast.kernels.library import BACKEND, triton


@dataclass(frozen=True, kw_only=True)
class Row:
    """One launch of a kernel; or, where ``kernel`` is empty, all launches of an operator.

    Attributes:
        moved: bytes. flop: operations of products.
        limit_us: what these take at least. us: the estimate. share: of the limit in it.
        registers: of a thread. spilled: bytes of a thread. shared: bytes of a program.
        load: bytes that one load of a thread brings; see :class:`Compilation`.
        resident: programs that a multiprocessor holds at once.
        programs: of the launch. idle: those of them that have nothing to do.
    """

    operator: str
    shape: str
    arch: int
    kernel: str = ""
    moved: int
    flop: int
    limit_us: float
    us: float
    share: float
    registers: int | None = None
    spilled: int | None = None
    shared: int | None = None
    load: int | None = None
    resident: int | None = None
    programs: int | None = None
    idle: int | None = None


def rows_of(case: Case, arch: int, machine: Machine) -> list[Row]:
    """A row for all launches, and one for each of them."""
    launches = [_row(case, compiled, machine) for compiled in case.compiled(arch)]
    total = sum(row.us for row in launches) / 1e6
    least = limit(case.moved, case.flop, machine)
    whole = Row(
        operator=case.operator,
        shape=case.shape,
        arch=arch,
        moved=case.moved,
        flop=case.flop,
        **_times(least, total),
    )
    return [whole, *launches]


def _row(case: Case, compiled: Compilation, machine: Machine) -> Row:
    work = case.kernels[compiled.name](compiled)
    found = estimate(compiled, work, machine)
    return Row(
        operator=case.operator,
        shape=case.shape,
        arch=compiled.arch,
        kernel=compiled.name,
        moved=work.moved,
        flop=work.flop,
        **_times(found.limit, found.seconds),
        registers=compiled.registers,
        spilled=compiled.spilled,
        shared=compiled.shared,
        load=compiled.load_bytes,
        resident=found.resident,
        programs=compiled.programs,
        idle=found.idle,
    )


def _times(least: float, seconds: float) -> dict[str, float]:
    return {
        "limit_us": round(1e6 * least, 3),
        "us": round(1e6 * seconds, 3),
        "share": round(least / seconds, 4),
    }


def table_of(rows: Sequence[Row]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="On paper: us are estimates, nothing is measured")
    table.add_column("operator, kernel", no_wrap=True)
    of_kernel = "registers", "shared KB", "load B", "resident", "programs", "idle"
    for heading in ("sm", *of_kernel, "MB", "GFLOP", "limit us", "us", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        numbers = [
            f"{row.moved / 1e6:,.1f}",
            f"{row.flop / 1e9:,.1f}" if row.flop else "",
            f"{row.limit_us:,.1f}",
            f"{row.us:,.1f}",
            f"{row.share:.0%}",
        ]
        if not row.kernel:
            empty = [""] * len(of_kernel)
            name = f"{row.operator} {row.shape}"
            table.add_section()
            table.add_row(name, str(row.arch), *empty, *numbers, style="bold")
            continue
        table.add_row(
            f"  {row.kernel}",
            str(row.arch),
            f"{row.registers}" + (f" ({row.spilled} spilled)" if row.spilled else ""),
            f"{(row.shared or 0) / 1e3:.1f}",
            str(row.load or ""),
            str(row.resident),
            f"{row.programs:,}",
            f"{row.idle:,}" if row.idle else "",
            *numbers,
        )
    return table


def main(arguments: list[str] | None = None) -> int:
    every = list(cases())
    names = list(dict.fromkeys(case.operator for case in every))
    default = Machine()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="OPERATOR")
    parser.add_argument("--arch", nargs="+", type=int, choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--copy", type=float, default=default.copy / 1e12, help="TB/s")
    parser.add_argument("--product", type=float, default=default.product / 1e12, help="TFLOP/s")
    parser.add_argument("--out", type=Path, help="JSON")
    args = parser.parse_args(arguments)
    if BACKEND != "auto":
        parser.error(f"W2S_FAST_BACKEND is {BACKEND}: kernels are not compiled")
    machine = default._replace(copy=args.copy * 1e12, product=args.product * 1e12)

    def rows() -> Iterator[Row]:
        for case in every:
            if case.operator in args.only:
                for arch in args.arch:
                    yield from rows_of(case, arch, machine)

    found = list(rows())
    width = None if sys.stdout.isatty() else 170
    Console(width=width).print(table_of(found))
    if args.out is not None:
        report = {
            "date": time.strftime("%Y-%m-%d"),
            "commit": commit(),
            "triton": triton.__version__,
            "machine": machine._asdict(),
            "rows": [asdict(row) for row in found],
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
