"""A report of bench.fleet as tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.fleet_simulation import ROUTERS

PAYS = 0.01  # a gain below this is not worth a router that knows prompts


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def lines(report: dict[str, Any]) -> list[str]:
    """The tables of a report that is whole; they stand in docs/fleet.md as well."""
    said = ["Weights and a request", ""]
    said += table(
        ["models", "GPUs a replica", "weights", "a token in all models", "a request",
         "of it in the base", "in the guides", "of them fit", "run at once"],
        [
            [
                row["setup"], f"{row['gpus']} {row['gpu']}", f"{row['weight_bytes'] / 1e9:.1f} GB",
                f"{row['kv_bytes']:,} B", f"{row['request_bytes'] / 1e9:.2f} GB",
                f"{row['of_base'] / 1e9:.2f} GB", f"{row['of_guides'] / 1e9:.2f} GB",
                f"{row['fit']:,}", str(row["at_once"]),
            ]
            for row in report["memory"]
        ],
    )  # fmt: skip
    said += ["", "What a replica does at most, and what it costs", ""]
    said += table(
        ["models", "a prompt, ms", "requests/s", "answer tokens/s", "$ for 1,000 tokens, full",
         f"at {report['assumed']['at_load']:.0%}", "router full at: 50 us", "200 us", "1 ms"],
        [
            [
                row["setup"], f"{row['prompt_ms']:.1f}", f"{row['requests_per_s']:.2f}",
                f"{row['tokens_per_s']:,.0f}", f"{row['cost_full']:.5f}",
                f"{row['cost_at_load']:.5f}",
                *(f"{n:,.0f}" for n in row["router_full_at"].values()),
            ]
            for row in report["memory"]
        ],
    )  # fmt: skip
    said += ["", "By the number of replicas", ""]
    said += table(
        ["models", "replicas", "router", "its process is busy", "answer tokens/s", "p50, s",
         "p99, s", "cached"],
        [
            [
                row["setup"], f"{row['replicas']:,}", row["router"], f"{row['router_busy']:.1%}",
                f"{row['tokens_per_s']:,.0f}", *_latencies(row), f"{row['cached']:.0%}",
            ]
            for row in report["scaling"]
        ],
    )  # fmt: skip
    said += ["", "By load", ""]
    said += table(
        ["load", "p50, s: random", "by load", "by prefix", "p99, s: random", "by load",
         "by prefix"],
        [
            [f"{load:.0%}", *(f"{by[r][q]:.2f}" for q in ("p50", "p99") for r in ROUTERS)]
            for load, by in _by_load(report["loads"]).items()
        ],
    )  # fmt: skip
    said += ["", "By the bound of a router that knows prompts", ""]
    said += table(
        ["bound, times the mean load", "p50, s", "p99, s", "cached"],
        [
            [
                f"{row['bound']:.2f}",
                f"{row['p50']:.2f}",
                f"{row['p99']:.2f}",
                f"{row['cached']:.0%}",
            ]
            for row in report["bounds"]
        ],
    )
    for title, name in (
        ("By shared tokens and cache", "sharing"),
        ("By groups", "groups"),
        ("By prompts", "prompts"),
    ):
        said += ["", title, ""]
        said += table(
            ["prompt", "shared", "groups", "cache, tokens", "cached by load", "by prefix",
             "gain", "p99, s: by load", "by prefix"],
            [
                [
                    f"{row['prompt']:,}", f"{row['shared']:,}", f"{row['groups']:,}",
                    f"{row['cache_tokens']:,}", f"{row['cached_by_load']:.0%}",
                    f"{row['cached_by_prefix']:.0%}", f"{row['gain']:+.1%}",
                    f"{row['p99_by_load']:.2f}", f"{row['p99_by_prefix']:.2f}",
                ]
                for row in report[name]
            ],
        )  # fmt: skip
    said.append("")
    for cache in dict.fromkeys(row["cache_tokens"] for row in report["sharing"]):
        least = pays_from([row for row in report["sharing"] if row["cache_tokens"] == cache])
        told = "never" if least is None else f"from {least} shared tokens on"
        said.append(f"Worth {PAYS:.0%} with a cache of {cache:,} tokens: {told}")
    return said


def _latencies(row: dict[str, Any]) -> list[str]:
    """Where the router is asked for more than it can do, they grow as long as that lasts."""
    if row["router_busy"] >= 1:
        return ["grows", "grows"]
    return [f"{row['p50']:.2f}", f"{row['p99']:.2f}"]


def _by_load(rows: Sequence[dict[str, Any]]) -> dict[float, dict[str, dict[str, Any]]]:
    by: dict[float, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by.setdefault(row["load"], {})[row["router"]] = row
    return by


def pays_from(rows: Sequence[dict[str, Any]]) -> int | None:
    """The fewest shared tokens from which on routing by prefix is worth it; None: it never is."""
    by_shared = sorted(rows, key=lambda row: row["shared"])
    worth = None
    for row in reversed(by_shared):
        if round(row["gain"], 3) < PAYS:  # as the table shows it
            break
        worth = int(row["shared"])
    return worth
