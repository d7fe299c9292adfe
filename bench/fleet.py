"""Many replicas behind a router, on paper: tokens a second, latencies, memory, and what it costs.

    python -m bench.fleet --out bench/results/fleet.json --plot docs/fleet.svg
    python -m bench.fleet --quick                      few replicas: does it run?

A simulation (bench/fleet_simulation.py) of replicas whose rounds take as long as they were measured
to take, or as a formula says (bench/fleet_setups.py). Nothing is measured here, and no network,
failure or start of a replica is simulated. What is assumed is in the report, and in docs/fleet.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.fleet_plot import plot
from bench.fleet_setups import (
    PROMPT,
    Setup,
    cost_of,
    eight,
    eight_by_formula,
    gpt2_xl,
    interpolated,
    seventy,
)
from bench.fleet_simulation import (
    BOUND,
    LOAD,
    PREFIX,
    ROUTERS,
    SLACK,
    Replica,
    Summary,
    Traffic,
    arrivals,
    simulate,
    summary,
)
from bench.fleet_tables import PAYS, lines
from bench.reports import facts, run, save

PASS_TOKENS = 8192  # of prompts between two rounds: an engine's default where memory is not tight
# Assumed: of a router that counts requests in one process, and of one that compares prompts, too.
DECISION_S, SLOW_DECISION_S = 50e-6, 200e-6
SLOW_PREFIX = f"{PREFIX}, 200 us"
AT_LOAD = 0.7  # of what replicas can do if nothing is cached
OVER = 1.5  # more than they can do: what comes out is all that they can
PRICE = 3.0  # assumed: dollars for an hour of a GPU, whichever


@dataclass(frozen=True)
class Scale:
    """How much is simulated. ``each``: requests a replica; ``least``: in all."""

    replicas: tuple[int, ...] = (1, 3, 10, 30, 100, 300, 1000)
    few: tuple[int, ...] = (1, 10, 100, 1000)  # of the setups that are larger
    each: int = 200
    least: int = 20_000
    of_loads: int = 100  # replicas in the tables that do not go by their number
    of_sharing: int = 32
    each_sharing: int = 800
    bounds: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 4.0)
    loads: tuple[float, ...] = (0.3, 0.5, 0.7, 0.8, 0.9)
    caches: tuple[float, ...] = (0.25, 1, 4)  # of what the memory leaves
    shared: tuple[int, ...] = (0, 128, 256, 384, 480)
    groups: tuple[int, ...] = (20, 200, 2000, 20_000, 200_000)
    prompts: tuple[int, ...] = (512, 2048, 8192)


QUICK = Scale(
    (1, 4), (1, 4), 40, 100, 4, 2, 60, (1.0,), (0.7,), (0.25,), (0, 384), (50,), (512,),
)  # fmt: skip


def capacity(setup: Setup, traffic: Traffic) -> float:
    """Requests a second that a replica can do at most, if nothing of their prompts is cached."""
    rounds = setup.rounds_ms[setup.most] / 1e3 / setup.most * traffic.mean_rounds(setup.chunk)
    prompts = setup.prompt_seconds(PASS_TOKENS) / PASS_TOKENS * traffic.prompt
    return 1 / (rounds + prompts)


def replica_of(setup: Setup, traffic: Traffic, cache_tokens: int | None = None) -> Replica:
    """``cache_tokens``: None: what the memory leaves."""
    times = (interpolated(setup.rounds_ms, n) / 1e3 for n in range(1, setup.most + 1))
    if cache_tokens is None:
        cache_tokens = setup.cache_tokens(traffic.prompt, traffic.mean_answer)
    return Replica(
        [0.0, *times], setup.prompt_seconds, setup.chunk, PASS_TOKENS, cache_tokens
    )  # fmt: skip


def found(
    setup: Setup,
    traffic: Traffic,
    router: str,
    replicas: int,
    count: int,
    load: float,
    *,
    decision_s: float = DECISION_S,
    bound: float = BOUND,
    cache_tokens: int | None = None,
) -> Summary:
    """What a fleet does with so many requests, at ``load`` times what it can do uncached."""
    rate = load * replicas * capacity(setup, traffic)
    asked = arrivals(traffic, rate, count, seed=0)
    replica = replica_of(setup, traffic, cache_tokens)
    outcome = simulate(
        replica, replicas, traffic, asked, router, decision_s=decision_s, bound=bound
    )  # fmt: skip
    return summary(asked, outcome, traffic.prompt)


def scaling_rows(
    setup: Setup, traffic: Traffic, sizes: Sequence[int], scale: Scale, routers: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """By the number of replicas, at a fixed load of each."""
    for replicas in sizes:
        for router in routers:
            slow = router == SLOW_PREFIX
            decision = SLOW_DECISION_S if slow else DECISION_S
            count = max(scale.least, scale.each * replicas)
            own = PREFIX if slow else router
            seen = found(setup, traffic, own, replicas, count, AT_LOAD, decision_s=decision)
            rate = AT_LOAD * replicas * capacity(setup, traffic)
            yield {
                "setup": setup.name, "replicas": replicas, "router": router,
                "router_busy": rate * decision, **asdict(seen),
            }  # fmt: skip


def load_rows(setup: Setup, traffic: Traffic, scale: Scale) -> Iterator[dict[str, Any]]:
    """By the load of each replica: what routing by load is worth."""
    replicas = scale.of_loads
    count = max(scale.least, scale.each * replicas)
    for load in scale.loads:
        for router in ROUTERS:
            seen = found(setup, traffic, router, replicas, count, load)
            yield {"setup": setup.name, "load": load, "router": router, **asdict(seen)}


def bound_rows(setup: Setup, traffic: Traffic, scale: Scale) -> Iterator[dict[str, Any]]:
    """By how much more than the mean a replica may have for its prompts' sake."""
    replicas = scale.of_loads
    count = max(scale.least, scale.each * replicas)
    for bound in scale.bounds:
        seen = found(setup, traffic, PREFIX, replicas, count, AT_LOAD, bound=bound)
        yield {"setup": setup.name, "bound": bound, **asdict(seen)}


def gain_row(
    setup: Setup, traffic: Traffic, scale: Scale, cache_tokens: int | None = None
) -> dict[str, Any]:
    """Routing by prefix beside routing by load: what comes out at most, and the 99th percentile.

    ``gain``: of answer tokens a second when more is asked than can be done.
    """
    replicas = scale.of_sharing
    count = replicas * scale.each_sharing
    if cache_tokens is None:
        cache_tokens = setup.cache_tokens(traffic.prompt, traffic.mean_answer)
    (load_over, load_at), (prefix_over, prefix_at) = (
        [
            found(setup, traffic, router, replicas, count, load, cache_tokens=cache_tokens)
            for load in (OVER, AT_LOAD)
        ]
        for router in (LOAD, PREFIX)
    )
    return {
        "setup": setup.name, "prompt": traffic.prompt, "shared": traffic.shared,
        "groups": traffic.groups, "cache_tokens": cache_tokens,
        "cached_by_load": load_over.cached, "cached_by_prefix": prefix_over.cached,
        "gain": prefix_over.tokens_per_s / load_over.tokens_per_s - 1,
        "p99_by_load": load_at.p99, "p99_by_prefix": prefix_at.p99,
    }  # fmt: skip


def memory_row(setup: Setup, traffic: Traffic, price: float) -> dict[str, Any]:
    """Bytes of the weights and of a request when its answer is of mean length; dollars."""
    base, *guides = (model.weights.kv_bytes for model in setup.models)
    parts = setup.request_parts(traffic.prompt, traffic.mean_answer)
    tokens = sum(parts)
    rate = capacity(setup, traffic)
    answer = rate * traffic.mean_tokens
    return {
        "setup": setup.name, "gpu": setup.gpu, "gpus": setup.gpus, "rounds": setup.source,
        "chunk": setup.chunk, "at_once": setup.most, "weight_bytes": setup.weight_bytes,
        "kv_bytes": setup.kv_bytes, "request_parts": parts,
        "request_bytes": tokens * setup.kv_bytes,
        "of_base": tokens * base, "of_guides": tokens * sum(guides),
        "fit": setup.page_tokens // tokens,
        "cache_tokens": setup.cache_tokens(traffic.prompt, traffic.mean_answer),
        "prompt_share": setup.prompt_share, "prompt_ms": 1e3 * setup.prompt_seconds(PASS_TOKENS)
        * traffic.prompt / PASS_TOKENS,
        "requests_per_s": rate, "tokens_per_s": answer,
        "cost_full": cost_of(1000, answer, setup.gpus, price),
        "cost_at_load": cost_of(1000, AT_LOAD * answer, setup.gpus, price),
        "router_full_at": {
            str(us): 1 / (us * 1e-6 * AT_LOAD * rate) for us in (50, 200, 1000)
        },
    }  # fmt: skip


def simulated(
    report: dict[str, Any], scale: Scale, price: float, quick: bool
) -> Iterator[dict[str, Any]]:
    """The report, as it grows."""
    traffic = Traffic(groups=50) if quick else Traffic()
    xl, setups = gpt2_xl(), [gpt2_xl(), eight(), seventy()]
    report["traffic"] = asdict(traffic)
    report["assumed"] = {
        "at_load": AT_LOAD, "over": OVER, "decision_s": DECISION_S,
        "slow_decision_s": SLOW_DECISION_S, "pass_tokens": PASS_TOKENS, "price": price,
        "bound": BOUND, "slack": SLACK,
        "pays": PAYS, "scale": asdict(scale),
    }  # fmt: skip
    report["memory"] = [memory_row(setup, traffic, price) for setup in setups]
    yield report
    report["scaling"] = []
    for setup in setups:
        own = setup.name == xl.name
        sizes, routers = (
            (scale.replicas, (*ROUTERS, SLOW_PREFIX)) if own else (scale.few, (LOAD, PREFIX))
        )
        for row in scaling_rows(setup, traffic, sizes, scale, routers):
            report["scaling"].append(row)
            yield report
    report["loads"] = list(load_rows(xl, traffic, scale))
    report["bounds"] = list(bound_rows(xl, traffic, scale))
    yield report
    report["sharing"], cache = [], xl.cache_tokens(PROMPT, traffic.mean_answer)
    for cache_tokens in (int(part * cache) for part in scale.caches):
        for shared in scale.shared:
            own_traffic = replace(traffic, shared=shared, own=PROMPT - shared)
            report["sharing"].append(gain_row(xl, own_traffic, scale, cache_tokens))
            yield report
    report["groups"] = [gain_row(xl, replace(traffic, groups=n), scale) for n in scale.groups]
    yield report
    report["prompts"] = []
    for prompt in scale.prompts:
        long = replace(traffic, shared=prompt * 3 // 4, own=prompt // 4)
        report["prompts"].append(gain_row(eight_by_formula(prompt), long, scale))
        yield report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.fleet")
    parser.add_argument("--quick", action="store_true", help="few replicas: does it run?")
    parser.add_argument("--price", type=float, default=PRICE, help="dollars an hour of a GPU")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path, help="an SVG of it; needs matplotlib")
    args = parser.parse_args(arguments)
    report = facts("bench.fleet", sys.argv[1:] if arguments is None else arguments)
    begin = time.perf_counter()
    for grown in simulated(report, QUICK if args.quick else Scale(), args.price, args.quick):
        save(args.out, grown, complete=False)
    report["seconds"] = time.perf_counter() - begin
    save(args.out, report, complete=True)
    print("\n".join(lines(report)))
    print(f"simulated in {report['seconds']:.0f} s", file=sys.stderr)
    if args.plot is not None:
        plot(report, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(run(lambda: main()))
