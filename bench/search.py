"""Time and memory of the search, against transformers' sampling and the search as released.

    python -m bench.search --out bench/results/search.json      every case
    python -m bench.search --only small-guides --repeats 9      one case, more closely
    python -m bench.search --only small-guides --profile        where its milliseconds go
    python -m bench.search --quick                              tiny shapes: does it run?

The variants of a case run one after the other in one process, in turns, so that whatever slows the
machine down for a while slows all of them. A ratio is taken within a turn; its median is compared
with the target. Every run's number of sampled tokens is checked. Where other programs take much of
the machine, the ratios of processor time under ``OMP_WAIT_POLICY=passive`` say more: waiting
threads then sleep. The baselines are described in ``baselines.py``, the cases in
``search_cases.py``, what memory means in ``search_memory.py``.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from bench import reports
from bench.machine import cores, machine_seconds, share_of_others
from bench.search_cases import RELEASED, Bench, Case, Ratio, cases
from bench.search_memory import Memory, measure
from bench.search_profile import profile

MEMORY_TARGET = 1.2  # x (weights + pages)
# Baseline B takes most of the time, and its ratios are the furthest from their targets.
MOST_RELEASED = 3


@dataclass
class Timing:
    """One variant, run by run.

    Attributes:
        seconds: of the clock.
        cpu_seconds: of all cores that this process had: more than ``cores * seconds`` cannot be,
            and much less says that others had the machine.
        tokens: sampled in one run.
    """

    seconds: list[float]
    cpu_seconds: list[float]
    tokens: int


@dataclass
class Outcome:
    """A case, measured."""

    case: Case
    timings: dict[str, Timing]
    memory: Memory | None

    def ratio(self, ratio: Ratio) -> list[float]:
        """One value a turn: seconds a token of one variant over those of the other."""
        over, under = self.timings[ratio.over], self.timings[ratio.under]
        return _per_token(over.seconds, over.tokens, under.seconds, under.tokens)

    def cpu_ratio(self, ratio: Ratio) -> list[float]:
        """The same of processor time: on a busy machine it says more than the clock does."""
        over, under = self.timings[ratio.over], self.timings[ratio.under]
        return _per_token(over.cpu_seconds, over.tokens, under.cpu_seconds, under.tokens)


def _per_token(
    over: Sequence[float], over_tokens: int, under: Sequence[float], under_tokens: int
) -> list[float]:
    return [(a / over_tokens) / (b / under_tokens) for a, b in zip(over, under)]


def main(arguments: Sequence[str] | None = None) -> int:
    names = [case.name for case in cases()]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=names, action="append", help="a case; may be repeated")
    parser.add_argument("--repeats", type=int, default=7, help="turns of a case")
    parser.add_argument(
        "--released", type=int, default=MOST_RELEASED, help="turns of baseline B, at most"
    )
    parser.add_argument("--out", type=Path, help="JSON of everything measured")
    parser.add_argument("--quick", action="store_true", help="tiny models and texts")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--profile", action="store_true", help="one traced run of each case")
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(arguments)
    if args.repeats < 1 or args.released < 1:
        parser.error("--repeats and --released are at least 1")
    # Tiny operators on several threads would only wait for each other.
    torch.set_num_threads(1 if args.quick else cores())
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    chosen = [case for case in cases(args.quick) if not args.only or case.name in args.only]
    if args.profile:
        for case in chosen:
            profile(case, console)
        return 0
    start = machine_seconds()
    said = reports.facts("bench.search", arguments) | {"quick": args.quick}
    outcomes: list[Outcome] = []
    for case in chosen:
        memory = None if args.no_memory else measure(case, args.quick)
        outcomes.append(Outcome(case, {}, memory))
        for turn, timings in enumerate(time_case(case, args.repeats, args.released), start=1):
            outcomes[-1].timings = timings
            others = share_of_others(start, machine_seconds())
            complete = len(outcomes) == len(chosen) and turn == args.repeats
            reports.save(args.out, said | report(outcomes, others), complete=complete)
        show(outcomes[-1], console)
    if others is not None:
        console.print(f"Other programs took {100 * others:.0f} % of this machine's time meanwhile.")
    return 0


def time_case(
    case: Case, repeats: int, released: int = MOST_RELEASED
) -> Iterator[dict[str, Timing]]:
    """Every variant ``repeats`` times, in turns; each turn begins with another variant.

    Baseline B runs ``released`` times at most.

    Yields what there is after each turn, in one and the same dictionary.
    """
    bench = Bench(case)
    for variant in case.variants:  # warm up; two chunks show B everything it will see
        bench.run(variant, new_tokens=case.params.tokens_per_round * 2)
    timings = {variant: Timing([], [], 0) for variant in case.variants}
    for turn in range(repeats):
        first = turn % len(case.variants)
        print(f"{case.name}, turn {turn + 1} of {repeats}:", end="", file=sys.stderr, flush=True)
        for variant in (*case.variants[first:], *case.variants[:first]):
            if variant == RELEASED and turn >= released:
                continue
            gc.collect()
            begin, cpu_begin = time.perf_counter(), time.process_time()
            tokens = bench.run(variant, seed=turn)
            seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
            timings[variant].seconds.append(seconds)
            timings[variant].cpu_seconds.append(cpu_seconds)
            timings[variant].tokens = tokens
            said = f" {variant} {seconds:.2f} s ({cpu_seconds:.2f} s CPU);"
            print(said, end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        yield timings


def show(outcome: Outcome, console: Console) -> None:
    """The case's tables."""
    console.print(f"\n[bold]{outcome.case.name}[/bold]: {outcome.case.shape}")
    times = Table("variant", box=box.ROUNDED)
    for heading in ("runs", "median s", "quartiles", "CPU s", "tokens/s"):
        times.add_column(heading, justify="right")
    for variant, timing in outcome.timings.items():
        low, median, high = quartiles(timing.seconds)
        rate = f"{timing.tokens / median:,.0f}"
        spread = f"{low:.2f} - {high:.2f}"
        cpu = f"{quartiles(timing.cpu_seconds)[1]:.2f}"
        times.add_row(variant, str(len(timing.seconds)), f"{median:.2f}", spread, cpu, rate)
    console.print(times)
    ratios = Table("ratio", box=box.ROUNDED)
    for heading in ("median", "quartiles", "target", "met", "by CPU time"):
        ratios.add_column(heading, justify="right")
    for ratio in outcome.case.ratios:
        low, median, high = quartiles(outcome.ratio(ratio))
        spread = f"{low:.3f} - {high:.3f}"
        met = "yes" if ratio.met(median) else "NO"
        cpu = f"{quartiles(outcome.cpu_ratio(ratio))[1]:.3f}"
        ratios.add_row(ratio.name, f"{median:.3f}", spread, ratio.target, met, cpu)
    if outcome.memory is not None:
        value = outcome.memory.ratio
        met = "yes" if value <= MEMORY_TARGET else "NO"
        name = "peak memory / (weights + pages)"
        ratios.add_row(name, f"{value:.3f}", "", f"<= {MEMORY_TARGET:g}", met, "")
    console.print(ratios)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return low, median, high


def report(outcomes: Sequence[Outcome], others: float | None) -> dict[str, Any]:
    """What was measured, case by case."""
    return {
        "share_of_machine_taken_by_others": others,
        "environment": {
            name: value
            for name, value in os.environ.items()
            if name.startswith(("OMP_", "GOMP_", "KMP_", "MKL_", "MALLOC_"))
        },
        "cases": [_case_report(outcome) for outcome in outcomes],
    }


def _case_report(outcome: Outcome) -> dict[str, Any]:
    ratios = []
    for ratio in outcome.case.ratios:
        values = outcome.ratio(ratio)
        low, median, high = quartiles(values)
        ratios.append(
            {
                "name": ratio.name,
                "median": median,
                "quartiles": [low, high],
                "values": values,
                "by_cpu_time": outcome.cpu_ratio(ratio),
                "target": ratio.target,
                "met": ratio.met(median),
            }
        )
    memory = outcome.memory
    return {
        "name": outcome.case.name,
        "shape": outcome.case.shape,
        "variants": {
            variant: {
                **asdict(timing),
                "median_seconds": quartiles(timing.seconds)[1],
                "tokens_per_second": timing.tokens / quartiles(timing.seconds)[1],
            }
            for variant, timing in outcome.timings.items()
        },
        "ratios": ratios,
        "memory": memory
        and {
            **asdict(memory),
            "ratio": memory.ratio,
            "target": f"<= {MEMORY_TARGET:g}",
            "met": memory.ratio <= MEMORY_TARGET,
        },
    }


if __name__ == "__main__":
    sys.exit(reports.run(main))
