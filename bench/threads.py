"""Torch's threads as the command sets them, beside a busy neighbour and alone.

    python -m bench.threads --out bench/results/threads.json
    python -m bench.threads --quick                    a tiny model: does it run?
    python -m bench.threads --also OMP_WAIT_POLICY=PASSIVE   another setting beside them

Each measurement is a process of its own, on two cores: it samples from a GPT-2 of 124 million
random weights. "torch" has the threads as torch takes them, "command" as `w2s-fast` does
(w2s_fast/cli/threads.py). The neighbour is a loop on one of the two cores. All take turns, and of
each the best turn counts: the ratios say how much longer a search takes, others aside.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# No torch up here: the processes that are measured import this file, and set their threads first.
from w2s_fast.cli import let_threads_sleep, take_usable_cores

TORCH, COMMAND = "torch", "command"
ROWS, CALLS = 16, 3
_OURS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
# At most so many times the idle seconds of torch's own threads.
ALONE, BESIDE = 1.1, 2.5


def sample(how: str, quick: bool) -> list[float]:
    """Seconds of some calls, behind one that is not measured; in a process without torch."""
    if how == COMMAND:
        let_threads_sleep()
    elif how != TORCH:
        name, value = how.split("=", 1)
        os.environ[name] = value

    import torch

    from bench.random_models import GPT2, TINY, make
    from w2s_fast import Engine, SearchParams

    if how == COMMAND:
        take_usable_cores()
    model = make(TINY if quick else GPT2, 0, torch.device("cpu"), torch.float32)
    engine = Engine(base=model, device="cpu", kv_cache_tokens=4096)
    params = SearchParams(method="sample", n=ROWS, max_new_tokens=2 if quick else 10)
    seconds = []
    for _ in range(CALLS + 1):
        begin = time.perf_counter()
        engine.generate([[1, 2, 3, 4, 5, 6, 7, 8]], params)
        seconds.append(time.perf_counter() - begin)
    return seconds[1:]


@contextmanager
def neighbour(core: int) -> Iterator[None]:
    """A process that is busy on a core all the time."""
    busy = f"import os\nos.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", busy])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def measured(how: str, shared: bool, cores: list[int], quick: bool) -> float:
    """Seconds of a call, in a process of its own: the mean of some."""
    options = ["--sample", how, *(["--quick"] if quick else [])]
    command = [sys.executable, "-m", "bench.threads", *options]
    ours = {k: v for k, v in os.environ.items() if k not in _OURS}

    def two_cores() -> None:
        os.sched_setaffinity(0, cores)

    def found() -> float:
        done = subprocess.run(
            command, env=ours, preexec_fn=two_cores, stdout=subprocess.PIPE, check=True, text=True
        )
        return statistics.mean(json.loads(done.stdout))

    if not shared:
        return found()
    with neighbour(cores[-1]):
        return found()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.threads")
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it run?")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--also", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sample", metavar="HOW", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.sample is not None:
        print(json.dumps(sample(args.sample, args.quick)))
        return 0

    from bench.machine import machine_seconds, share_of_others
    from bench.reports import facts, save

    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        print("two cores are needed", file=sys.stderr)
        return 1
    said: dict[str, Any] = facts("bench.threads", sys.argv[1:] if arguments is None else arguments)
    best: dict[str, float] = {}
    for _ in range(args.turns):
        for shared in (False, True):
            for how in (TORCH, COMMAND, *args.also):
                name = f"{how}, {'beside a neighbour' if shared else 'alone'}"
                start = machine_seconds()
                seconds = measured(how, shared, cores, args.quick)
                others = share_of_others(start, machine_seconds())
                print(f"{seconds:8.2f} s  {name}; others took {others or 0:.0%}", file=sys.stderr)
                best[name] = min(seconds, best.get(name, seconds))
    idle = best[f"{TORCH}, alone"]
    ratios = {name: seconds / idle for name, seconds in best.items()}
    for name, ratio in ratios.items():
        print(f"{ratio:6.2f} x  {best[name]:7.2f} s  {name}")
    targets = {f"{COMMAND}, alone": ALONE, f"{COMMAND}, beside a neighbour": BESIDE}
    missed = [name for name, most in targets.items() if ratios[name] > most]
    print(f"missed: {'; '.join(missed)}" if missed else "all targets met")
    report = {**said, "seconds": best, "ratios": ratios, "targets": targets}
    save(args.out, report, complete=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
