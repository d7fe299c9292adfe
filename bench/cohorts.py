"""From how many rows on two cohorts of requests are faster than one, on a GPU.

    python -m bench.cohorts --out bench/results/cohorts.json     on a GPU
    python -m bench.cohorts --dry-run --out dry.json             tiny models, any machine

With two, the host's part of a round hides behind the device's, and weights are read twice. Where
that pays is what :mod:`w2s_fast.scheduling.cohorts` has a table of. Models have random weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.decode import LARGE, MEDIUM, SMALL, TINY, timed_search
from bench.timing import commit
from w2s_fast import Engine, Guide
from w2s_fast.scheduling import Runner

ROWS = 16  # of a request: W=K=4


@dataclass
class Pair:
    """The same search in one cohort and in two.

    Attributes:
        rows: of all requests. one_ms, two_ms: a round of all of them. ratio: two over one.
    """

    base: str
    rows: int
    one_ms: float
    two_ms: float
    ratio: float


def compare(
    name: str, base: Any, guides: Any, requests: list[int], *, prompt: int, rounds: int, end: float
) -> list[Pair]:
    """Both, at every number of requests; nothing is begun after ``end``."""
    device = next(base.parameters()).device
    engine = Engine(
        base,
        Guide(*guides),
        device=device,
        kv_cache_tokens=None if device.type == "cuda" else 4096,
        prefix_cache=False,
        max_rows=ROWS * max(requests),
    )
    pairs = []
    for count in requests:
        if time.monotonic() > end:
            print(f"left out, for want of time: {name}, {count} requests", flush=True)
            continue
        ms = []
        for cohorts in (1, 2):
            engine.runner = Runner(engine._search, engine._scheduler, cohorts=cohorts)
            ms.append(1e3 * timed_search(engine, count, prompt, rounds) / rounds)
        one, two = ms
        pairs.append(Pair(name, ROWS * count, round(one, 3), round(two, 3), round(two / one, 3)))
        print(pairs[-1], flush=True)
    return pairs


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true", help="tiny models, on the CPU")
    parser.add_argument("--seconds", type=float, default=240, help="begin nothing after so long")
    args = parser.parse_args(arguments)
    if not (torch.cuda.is_available() or args.dry_run):
        sys.exit("bench.cohorts times a GPU; without one: --dry-run")
    device = torch.device("cpu" if args.dry_run else "cuda")
    dtype = torch.float32 if args.dry_run else torch.bfloat16
    end = time.monotonic() + args.seconds
    shapes = [("tiny", TINY)] if args.dry_run else [("1B", MEDIUM), ("8B", LARGE)]
    requests = [2, 3] if args.dry_run else [16, 32, 48, 64, 96, 128]
    guides = [(TINY if args.dry_run else SMALL).make(seed, device, dtype) for seed in (1, 2)]
    pairs: list[Pair] = []
    for name, shape in shapes:
        base = shape.make(0, device, dtype)
        prompt, rounds = (20, 2) if args.dry_run else (256, 8)
        pairs += compare(name, base, guides, requests, prompt=prompt, rounds=rounds, end=end)
        del base
    report = {
        "device": "cpu" if args.dry_run else torch.cuda.get_device_name(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "torch": torch.__version__,
        "pairs": [asdict(pair) for pair in pairs],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    for pair in pairs:
        print(f"{pair.base:5} {pair.rows:5} rows  {pair.one_ms} ms a round in one cohort"
              f"  {pair.two_ms} in two  {pair.ratio} x")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
