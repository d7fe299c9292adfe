"""The host's own time of a round on the GPU path, and what it asks of the device.

    python -m bench.host --out bench/results/host.json      every size
    python -m bench.host --requests 64 --chunks 5           some
    python -m bench.host --requests 64 --profile            which functions take the time
    python -m bench.host --quick                            tiny sizes: does it run?

Models and operators take no time (``host_engine.py``); one core, and this thread's processor time.
Each size and length is a search that samples whole responses, so that what is measured at a length
has come there round by round. Where that takes too long, it is measured where the search has come
to, and that length is reported. All lengths of a size take turns, so that whatever slows the
machine down for a while slows all of them; a ratio is taken within a turn. What crosses to the
device and back is counted in another, short search (tests/support/device.py).
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import pstats
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from bench import reports
from bench.host_engine import ROWS, Clock, HostEngine, Size
from bench.machine import machine_seconds, share_of_others
from tests.support.device import Counts, Device

# Rounds before the first that is measured: until then shapes come for the first time, and are
# recorded when they come again.
WARM_UP = 6
COUNTED = 3  # rounds, of which the largest counts are kept: some copy pages, others need not
# Rounds of a turn, behind one that is not measured: others had the caches before.
TURN = 10
FUNCTIONS_SHOWN = 25


@dataclass
class At:
    """Rounds of one size around one length.

    Attributes:
        length: tokens of the responses before the first turn.
        seconds: of the host, round by round.
        by_hand: passes of a round that no recording served, on average. On a GPU the host would
            run the model's own code there: that time is not in ``seconds``.
    """

    size: Size
    length: int
    seconds: list[float]
    by_hand: float

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def ratio_to(self, other: At) -> float:
        """How much longer than at another length, turn by turn."""
        turns = range(0, len(self.seconds), TURN)
        both = (
            [statistics.median(at.seconds[i : i + TURN]) for i in turns] for at in (self, other)
        )
        return statistics.median(a / b for a, b in zip(*both))


def measure(size: Size, lengths: Sequence[int], turns: int, budget: float) -> list[At]:
    """Turns at each of these lengths, in rising order, or as far as ``budget`` seconds go."""
    clock = Clock()
    end = time.monotonic() + budget
    hosts = [HostEngine(size, clock=clock) for _ in lengths]
    found: list[tuple[HostEngine, At]] = []
    with ExitStack() as searches:
        for length, host in zip(lengths, hosts):
            searches.enter_context(host.searching())
            done = 0
            while (done < WARM_UP or done * size.chunk < length) and time.monotonic() < end:
                host.round()
                host.record_missed()
                done += 1
            found.append((host, At(size, done * size.chunk, [], 0.0)))
            if time.monotonic() >= end:
                break
        for _ in range(turns):
            for host, at in found:
                host.round()
                host.record_missed()
                before = host.by_hand
                at.seconds += [host.round() for _ in range(TURN)]
                at.by_hand += (host.by_hand - before) / (TURN * turns)
    return [at for _, at in found]


def count(size: Size) -> Counts:
    """What one round asks of the device: of each number the largest of some rounds."""
    with Device() as device:
        host = HostEngine(replace(size, longest=(WARM_UP + COUNTED + 1) * size.chunk), device)
        found = []
        with host.searching():
            for _ in range(WARM_UP):
                host.round()
                host.record_missed()
            for _ in range(COUNTED):
                with device.counting() as counts:
                    host.round()
                found.append(counts)
    return Counts.largest(found)


def profile(size: Size, length: int, rounds: int) -> None:
    """Print the functions that take most of the host's time at a length, callees included."""
    host = HostEngine(size, clock=Clock(time.perf_counter))  # cheaper to ask, for every call
    with host.searching():
        for _ in range(max(WARM_UP, -(-length // size.chunk))):
            host.round()
            host.record_missed()
        profiler = cProfile.Profile(timer=host.clock.now)
        profiler.enable()
        for _ in range(rounds):
            host.round()
        profiler.disable()
    print(f"{size}: {rounds} rounds from {length} tokens on; the tracing itself takes time, too")
    pstats.Stats(profiler).sort_stats("cumulative").print_stats(FUNCTIONS_SHOWN)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, nargs="+", help="at once; each has 16 rows")
    parser.add_argument("--chunks", type=int, nargs="+", help="tokens of a round")
    parser.add_argument("--lengths", type=int, nargs="+", help="of the responses, in tokens")
    parser.add_argument("--turns", type=int, default=7, help=f"of {TURN} rounds, at each length")
    parser.add_argument("--seconds", type=float, default=60, help="to come to the longest length")
    parser.add_argument("--out", type=Path, help="JSON of everything measured")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--profile", action="store_true", help="at the shortest length")
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(arguments)
    if args.turns < 1:
        parser.error("--turns is at least 1")
    torch.set_num_threads(1)
    requests = args.requests or ([1, 2] if args.quick else [1, 16, 64, 256])
    chunks = args.chunks or ([3] if args.quick else [5, 30])
    lengths = sorted(args.lengths or ([18, 30] if args.quick else [50, 500, 4000]))
    prompt = 20 if args.quick else 512
    # Nobody comes to the end: a round that ends a search has other things to do.
    over = WARM_UP + args.turns * (TURN + 1) + 2
    sizes = [
        Size(count, chunk, prompt, lengths[-1] + over * chunk)
        for chunk in chunks
        for count in requests
    ]
    if args.profile:
        for size in sizes:
            profile(size, lengths[0], args.turns * TURN)
        return 0
    start = machine_seconds()
    said = reports.facts("bench.host", arguments) | {"quick": args.quick}
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    found: list[tuple[list[At], Counts]] = []
    for size in sizes:
        print(f"{size.requests} requests, chunks of {size.chunk}", file=sys.stderr, flush=True)
        found.append((measure(size, lengths, args.turns, args.seconds), count(size)))
        others = share_of_others(start, machine_seconds())
        complete = len(found) == len(sizes)
        reports.save(args.out, said | report(found, others), complete=complete)
        gc.collect()
    show(found, console)
    if others is not None:
        console.print(f"Other programs took {100 * others:.0f} % of this machine's time meanwhile.")
    return 0


def show(found: Sequence[tuple[Sequence[At], Counts]], console: Console) -> None:
    """Times by length, and counts, which do not depend on it."""
    sized = ("requests", "chunk")
    times = Table(*sized, "length", box=box.ROUNDED, title="The host's time of a round")
    for heading in ("ms", "smallest", "us a row", "x the shortest", "by hand"):
        times.add_column(heading, justify="right")
    counts = Table(*sized, box=box.ROUNDED, title="What a round asks of the device")
    for heading in ("waits", "reads", "copies to it", "replays", "other launches"):
        counts.add_column(heading, justify="right")
    for measured, counted in found:
        for at in measured:
            times.add_row(
                *(str(n) for n in (at.size.requests, at.size.chunk, at.length)),
                f"{1e3 * at.median:.2f}",
                f"{1e3 * min(at.seconds):.2f}",
                f"{1e6 * at.median / at.size.rows:.1f}",
                f"{at.ratio_to(measured[0]):.2f}",
                f"{at.by_hand:.1f}",
            )
        size = measured[0].size
        numbers = (counted.waits, counted.reads, counted.copies, counted.replays, counted.launches)
        counts.add_row(str(size.requests), str(size.chunk), *(str(number) for number in numbers))
    console.print(times)
    console.print(counts)


def report(found: Sequence[tuple[Sequence[At], Counts]], others: float | None) -> dict[str, Any]:
    """What was measured, size by size."""
    return {
        "share_of_machine_taken_by_others": others,
        "rows_of_a_request": ROWS,
        "sizes": [
            {
                "requests": measured[0].size.requests,
                "chunk": measured[0].size.chunk,
                "prompt": measured[0].size.prompt,
                "counts": vars(counted),
                "lengths": [
                    {
                        "length": at.length,
                        "ms": 1e3 * at.median,
                        "ms_smallest": 1e3 * min(at.seconds),
                        "us_per_row": 1e6 * at.median / at.size.rows,
                        "of_shortest": at.ratio_to(measured[0]),
                        "by_hand": at.by_hand,
                        "seconds": at.seconds,
                    }
                    for at in measured
                ],
            }
            for measured, counted in found
        ],
    }


if __name__ == "__main__":
    sys.exit(reports.run(main))
