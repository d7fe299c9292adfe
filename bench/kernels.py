"""Time of every operator between hidden states and beams, against what the machine can do.

    python -m bench.kernels --out bench/results/kernels.json       on a GPU
    python -m bench.kernels --dry-run --out dry.json               tiny shapes, any machine

Each row gives the median time inside a CUDA graph, and the time that Python takes to launch the
call; GB/s or TFLOP/s, and the share of the copy bandwidth or matmul rate measured in the same run;
or the ratio to a baseline timed in the same run. A case that fails is reported as such, and the
others go on. The file holds all rows so far, whatever ends the run.
"""

from __future__ import annotations

import argparse
import gc
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench import reports
from bench.attention_cases import attention_cases
from bench.kernel_cases import Case, Scale, Work, cases
from bench.rows import Rows, Seconds
from bench.timing import Limits, time_call
from w2s_fast.kernels.library import BACKEND


@dataclass
class Row:
    """One line of the result. Times in microseconds.

    Attributes:
        us: on the device. host_us: Python's, to launch the call; None on a CPU.
        not_recorded: why the call ran in no CUDA graph; empty if it did.
        ratios: of ``us`` to others, by name.
    """

    name: str
    shape: str
    us: float | None = None
    host_us: float | None = None
    not_recorded: str = ""
    gb_per_s: float | None = None
    share_of_copy: float | None = None
    tflop_per_s: float | None = None
    share_of_matmul: float | None = None
    ratios: dict[str, float] = field(default_factory=dict)
    target: str = ""
    error: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on the CPU if need be")
    parser.add_argument("--seconds", type=float, default=180, help="start no case after this long")
    parser.add_argument("--only", nargs="+", default=[""], help="operators whose names begin so")
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.dry_run:
        parser.error("no GPU here; --dry-run runs tiny shapes on the CPU")
    limits = Limits.measure(device, *((2**20, 128) if args.dry_run else (2**30, 8192)))
    scale: Scale = "tiny" if args.dry_run else "gpu"
    head = reports.facts("bench.kernels", arguments) | {
        "dry_run": args.dry_run,
        "backend": BACKEND,
        "copy_gb_per_s": limits.copy / 1e9,
        "matmul_tflop_per_s": {name: rate / 1e12 for name, rate in limits.matmul.items()},
    }
    report, seconds = Rows(args.out, head), Seconds(args.seconds)
    gc.freeze()  # every capture collects garbage, and would look through all modules
    try:
        for case in (*cases(device, scale), *attention_cases(device, scale)):
            if not case.name.startswith(tuple(args.only)):
                continue
            in_time = seconds.left > 0
            row = measure(case, limits) if in_time else failed(case, "not run: time was up")
            print(line(row), flush=True)
            report.add(row)
    finally:
        gc.unfreeze()
    report.end()
    return 1 if any(row.error for row in report.kept) else 0


def measure(case: Case, limits: Limits) -> Row:
    """The case made and timed, and all beside it; or what was raised meanwhile."""
    try:
        return row_of(case, case.make(), limits)
    except Exception as error:
        traceback.print_exc()
        return failed(case, f"{type(error).__name__}: {error}"[:300])


def failed(case: Case, why: str) -> Row:
    return Row(case.name, case.shape, target=case.target, error=why)


def row_of(case: Case, work: Work, limits: Limits) -> Row:
    """Everything about one case."""
    timing = time_call(work.call, work.inputs)
    seconds = timing.device_s
    row = Row(case.name, case.shape, 1e6 * seconds, target=case.target)
    row.host_us = None if timing.host_s is None else 1e6 * timing.host_s
    row.not_recorded = timing.not_recorded
    for name, value in rates(work, seconds, limits).items():
        setattr(row, name, value)
    if work.passes:
        # A pass reads its input once at the copy bandwidth, which counts reads and writes.
        row.ratios["passes"] = seconds / (work.moved / limits.copy)
    for name, call in work.beside.items():
        row.ratios[name] = seconds / time_call(call, work.inputs).device_s
    return row


def rates(work: Work, seconds: float, limits: Limits) -> dict[str, float]:
    """What a call that takes so long moves and computes a second, and of how much it could."""
    found = {}
    if work.moved:
        rate = work.moved / seconds
        found |= {"gb_per_s": rate / 1e9, "share_of_copy": rate / limits.copy}
    if work.flop:
        rate = work.flop / seconds
        found |= {"tflop_per_s": rate / 1e12, "share_of_matmul": rate / limits.matmul[work.dtype]}
    return found


def line(row: Row) -> str:
    """One row for a terminal."""
    if row.error:
        return f"{row.name:15s} {row.shape:40s} FAILED {row.error}"
    parts = [f"{row.us:9.1f} us"]
    if row.host_us is not None:
        parts.append(f"host {row.host_us:5.0f} us")
    if row.share_of_copy is not None:
        parts.append(f"{row.gb_per_s:7.0f} GB/s = {row.share_of_copy:.2f} of copy")
    if row.share_of_matmul is not None:
        parts.append(f"{row.tflop_per_s:5.0f} TFLOP/s = {row.share_of_matmul:.2f} of matmul")
    parts += [f"{value:.2f} {name}" for name, value in row.ratios.items()]
    if row.target:
        parts.append(f"(target {row.target})")
    if row.not_recorded:
        parts.append(f"launched one by one: {row.not_recorded}")
    return f"{row.name:15s} {row.shape:40s} " + ", ".join(parts)


if __name__ == "__main__":
    sys.exit(reports.run(main))
