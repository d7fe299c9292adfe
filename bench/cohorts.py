"""From how many rows on two cohorts of requests are faster than one, on a GPU.

    python -m bench.cohorts --out bench/results/cohorts.json     on a GPU
    python -m bench.cohorts --dry-run --out dry.json             tiny models, any machine

With two, the host's part of a round hides behind the device's, and weights are read twice. Where
that pays is what :mod:`w2s_fast.scheduling.cohorts` has a table of. Models have random weights.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bench.on_gpu import begin
from bench.random_models import LARGE, MEDIUM, SMALL, TINY, make, prompts_for
from bench.reports import INTERRUPTED, run
from bench.rows import Seconds
from w2s_fast import Engine, Guide, SearchParams
from w2s_fast.scheduling import Runner

ROWS, CHUNK = 16, 5  # of a request: W=K=4, L=5


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


def timed_search(engine: Engine, prompts: list[list[int]], rounds: int) -> float:
    """Seconds of the best of three searches. All their shapes have come twice before."""
    params = SearchParams(max_new_tokens=CHUNK * rounds, ignore_eos=True)
    for _ in range(2):
        engine.generate(prompts, params, progress=False)
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        engine.generate(prompts, params, progress=False)
        best = min(best, time.perf_counter() - begin)
    return best


def compare(
    name: str,
    base: Any,
    guides: Any,
    requests: list[int],
    *,
    prompt: int,
    rounds: int,
    seconds: Seconds,
) -> Iterator[Pair]:
    """Both, at every number of requests; nothing is begun when time is up."""
    device = base.device
    engine = Engine(
        base,
        Guide(*guides),
        device=device,
        kv_cache_tokens=None if device.type == "cuda" else 4096,
        prefix_cache=False,
        max_rows=ROWS * max(requests),
    )
    for count in requests:
        if seconds.left < 0:
            print(f"left out, for want of time: {name}, {count} requests", flush=True)
            continue
        prompts = prompts_for(base.config, count, prompt)
        ms = []
        for cohorts in (1, 2):
            engine.runner = Runner(engine._search, engine._scheduler, cohorts=cohorts)
            ms.append(1e3 * timed_search(engine, prompts, rounds) / rounds)
        one, two = ms
        yield Pair(name, ROWS * count, round(one, 3), round(two, 3), round(two / one, 3))


def main(arguments: list[str] | None = None) -> int:
    dry, device, _, seconds, report, _ = begin("bench.cohorts", __doc__, arguments, seconds=300)
    dtype = torch.float32 if dry else torch.bfloat16
    shapes = [("tiny", TINY)] if dry else [("1B", MEDIUM), ("8B", LARGE)]
    requests = [2, 3] if dry else [16, 32, 48, 64, 96, 128]
    guide = TINY if dry else SMALL
    prompt, rounds = (20, 2) if dry else (256, 8)
    status = 0
    try:
        guides = [make(guide, seed, device, dtype) for seed in (1, 2)]
        for name, shape in shapes:
            base = make(shape, 0, device, dtype)
            for pair in compare(
                name, base, guides, requests, prompt=prompt, rounds=rounds, seconds=seconds
            ):
                print(pair, flush=True)
                report.add(pair)
            del base
            gc.collect()
        report.end()
    except KeyboardInterrupt:
        status = INTERRUPTED
    for pair in report.kept:
        print(f"{pair.base:5} {pair.rows:5} rows  {pair.one_ms} ms a round in one cohort"
              f"  {pair.two_ms} in two  {pair.ratio} x")  # fmt: skip
    return status


if __name__ == "__main__":
    sys.exit(run(main))
