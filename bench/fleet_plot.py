"""A report of bench.fleet as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def plot(report: dict[str, Any], path: Path) -> None:
    """As SVG: tokens a second and latencies by replicas, and what knowing prompts gains."""
    # Not pyplot: it would look for a screen.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.2))
    tokens, seconds, gains = figure.subplots(1, 3)
    first = report["scaling"][0]["setup"]
    own = [row for row in report["scaling"] if row["setup"] == first]
    for i, router in enumerate(dict.fromkeys(row["router"] for row in own)):
        rows = [row for row in own if row["router"] == router]
        color = f"C{i}"
        replicas = [row["replicas"] for row in rows]
        style: dict[str, Any] = {"color": color, "marker": ".", "label": router}
        tokens.plot(replicas, [row["tokens_per_s"] for row in rows], **style)
        # Where the router is full, its queue grows as long as this lasts: no number says it.
        stable = [row for row in rows if row["router_busy"] < 1]
        at = [row["replicas"] for row in stable]
        seconds.plot(at, [row["p99"] for row in stable], **style)
        seconds.plot(at, [row["p50"] for row in stable], color=color, linestyle=":")
    for axes in (tokens, seconds):
        axes.set_xscale("log")
        axes.set_xlabel("replicas")
    tokens.set_yscale("log")
    tokens.set_ylabel("answer tokens/s")
    tokens.set_title(f"{first}, each at {report['assumed']['at_load']:.0%} load")
    tokens.legend(title="router")
    seconds.set_ylim(bottom=0)
    seconds.set_ylabel("seconds to the whole answer")
    seconds.set_title("latency: p99, and p50 (dotted)")
    for cache, rows in _by_cache(report["sharing"]).items():
        shared = [row["shared"] for row in rows]
        gain = [100 * row["gain"] for row in rows]
        gains.plot(shared, gain, marker=".", label=f"{cache:,}")
    gains.axhline(100 * report["assumed"]["pays"], color="grey", linewidth=0.8)
    gains.legend(title="cache, tokens a replica")
    gains.set_xlabel(f"tokens shared, of prompts of {report['sharing'][0]['prompt']}")
    gains.set_ylabel("% more answer tokens/s at most")
    gains.set_title("by prefix, over by load")
    for axes in (tokens, seconds, gains):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    # Neither the time nor names by chance: the same numbers give the same file.
    with rc_context({"svg.hashsalt": "w2s-fast"}):
        figure.savefig(path, metadata={"Date": None})


def _by_cache(rows: Sequence[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    by: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        by.setdefault(row["cache_tokens"], []).append(row)
    return by
