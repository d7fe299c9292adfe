"""An evaluation as a picture: reward with its interval, and fluency, by method."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from w2s_fast.evaluate.measures import Row

_FORMATS = ("png", "svg")


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def write_plots(rows: Sequence[Row], reward: str, stem: Path) -> list[Path]:
    """``stem`` with ``.png`` and ``.svg`` behind it; the paths written.

    ``reward``: what the gold reward is.
    """
    # Not pyplot: it would look for a screen.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    bases = list(dict.fromkeys(row.base for row in rows))
    methods = list(dict.fromkeys(row.method for row in rows))
    figure = Figure(figsize=(9, 1.2 + 0.3 * len(methods) * max(1, len(bases) / 2)))
    left, right = figure.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": (3, 2)})
    height = 0.8 / len(bases)
    for b, base in enumerate(bases):
        own = [row for row in rows if row.base == base]
        places = [methods.index(row.method) + (b - (len(bases) - 1) / 2) * height for row in own]
        left.errorbar(
            [row.reward.value for row in own],
            places,
            xerr=[row.reward.half_width for row in own],
            fmt="o",
            capsize=3,
            label=base,
        )
        right.plot([row.fluency for row in own], places, "o")
    left.set_yticks(range(len(methods)), methods)
    left.invert_yaxis()
    left.set_xlabel(f"gold reward ({reward}), 95 % interval")
    right.set_xlabel("fluency under the base, nats a token")
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
    if len(bases) > 1:
        figure.legend(*left.get_legend_handles_labels(), loc="upper right", ncols=len(bases))
    figure.tight_layout(rect=(0, 0, 1, 0.93 if len(bases) > 1 else 1))
    written = []
    for name in _FORMATS:
        path = stem.with_suffix(f".{name}")
        # Neither the time nor names by chance: the same numbers give the same file.
        with rc_context({"svg.hashsalt": "w2s-fast"}):
            figure.savefig(path, dpi=150, metadata={"Date": None} if name == "svg" else None)
        written.append(path)
    return written
