"""How an evaluation looks: a table in a terminal, CSV, JSON."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from w2s_fast.demo import Mean
from w2s_fast.evaluate.measures import NGRAMS, Row


def evaluation_table(rows: Sequence[Row], reward: str, ascii_only: bool = False) -> Table:
    """One row a method, the bases one below the other; what has most reward of each is bold.

    ``reward``: what the gold reward is.
    """
    seeds = f", {rows[0].seeds} seeds each" if rows[0].seeds > 1 else ""
    table = Table(
        title=f"{rows[0].prompts} prompts{seeds}; gold reward: {reward}",
        box=box.ASCII2 if ascii_only else box.SIMPLE_HEAD,
        title_style="bold",
        header_style="bold",
        padding=0,
    )
    table.add_column("base\n method", no_wrap=True)
    for name in (
        "gold reward\n95 % interval",
        "over best-of-N\nby prompt",
        "fluency\nnats",
        "\nby base",
        "distinct\n2-grams",
        "answer\ntok/s",
        "cost by\nbase",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        own = [other for other in rows if other.base == row.base]
        if row is own[0]:
            if i:
                table.add_section()
            table.add_row(row.base, style="bold")
        table.add_row(
            f" {row.method}",
            row.reward.shown(ascii_only),
            "" if row.over_best is None else row.over_best.shown(ascii_only),
            f"{row.fluency:.3f}",
            "" if row is own[0] else f"{row.fluency_change:+.1f} %",
            f"{row.distinct[1]:.2f}",
            f"{row.answer_tokens_per_s:,.1f}",
            f"{row.cost:.1f}",
            style="bold green" if row is max(own, key=lambda r: r.reward.value) else "",
        )
    return table


def table_lines() -> str:
    """What the columns mean."""
    return """\
Interval: Student's t over prompts, each the mean of its seeds. CBS: chunks of 5 tokens.
Fluency: the base's own log-prob per token of the answer, at temperature 1; a change above 0 means
that the base finds the answers likelier than its own.
Distinct: of all pairs of neighbouring words in a method's answers.
Tokens of returned answers, over wall time. Cost: time for one of them, by that of the base alone;
best-of-N and the searches draw 16 for each."""


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """All columns, one row a method."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(_flat(rows[0])))
        writer.writeheader()
        writer.writerows(_flat(row) for row in rows)


def write_json(rows: Sequence[Row], settings: Mapping[str, Any], path: Path) -> None:
    """The same with all that the numbers depend on."""
    record = {**settings, "rows": [_flat(row) for row in rows]}
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _flat(row: Row) -> dict[str, Any]:
    def mean(name: str, value: Mean | None) -> dict[str, float | None]:
        numbers = (None, None) if value is None else (value.value, value.half_width)
        return {
            key: None if number is None or not math.isfinite(number) else number
            for key, number in zip((name, f"{name}_half_width"), numbers)
        }

    return {
        "base": row.base,
        "method": row.method,
        "prompts": row.prompts,
        "seeds": row.seeds,
        **mean("reward", row.reward),
        **mean("over_base", row.over_base),
        **mean("over_best_of_n", row.over_best),
        "fluency": row.fluency,
        "fluency_change_percent": row.fluency_change,
        **{f"distinct_{n}": value for n, value in zip(NGRAMS, row.distinct)},
        "answer_tokens": row.length,
        "answer_tokens_per_s": row.answer_tokens_per_s,
        "sampled_tokens_per_s": row.sampled_tokens_per_s,
        "cost_by_base": row.cost,
    }
