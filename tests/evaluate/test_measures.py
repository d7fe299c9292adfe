"""What is measured of answers, against numbers worked out by hand."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from w2s_fast.demo import Mean, mean_with_interval
from w2s_fast.evaluate import (
    BASE,
    BEST_OF,
    Answer,
    Row,
    evaluation_table,
    measured,
    write_csv,
    write_json,
    write_plots,
)
from w2s_fast.evaluate.measures import distinct_ngrams


def answer(prompt: int, reward: float, fluency: float | None = -2.0, tokens: int = 10) -> Answer:
    return Answer(prompt, "a b", reward, fluency, tokens, 4 * tokens, 0.5)


def near(found: Mean | None, *values: float) -> bool:
    """Whether it is the mean of values, and its interval, up to rounding."""
    expected = mean_with_interval(values)
    return found is not None and tuple(vars(found).values()) == pytest.approx(
        tuple(vars(expected).values())
    )


@pytest.fixture
def rows() -> list[Row]:
    """Three prompts, two seeds; best-of-N has lost one answer."""
    base = [answer(p, r) for r in (0.0, 0.2) for p in range(3)]
    best = [answer(0, 0.5, -2.2), answer(1, 0.7, -2.2, tokens=5), answer(2, 0.6, -2.2)]
    search = [replace(a, reward=a.reward + 0.1 * a.prompt, seconds=1.0) for a in base]
    return measured("tiny", {BASE: base, BEST_OF: best, "search": search}, BASE, BEST_OF)


def test_a_prompts_reward_is_the_mean_of_its_seeds_and_prompts_are_the_sample(
    rows: list[Row],
) -> None:
    assert rows[0].reward.value == pytest.approx(0.1)
    assert rows[0].reward.half_width == pytest.approx(0.0)  # all prompts have the mean 0.1
    assert (rows[0].prompts, rows[0].seeds) == (3, 2)
    assert near(rows[2].reward, 0.1, 0.2, 0.3)


def test_gaps_are_taken_prompt_by_prompt(rows: list[Row]) -> None:
    base, best, search = rows
    assert base.over_base is None and best.over_best is None
    assert near(search.over_base, 0.0, 0.1, 0.2)
    assert near(search.over_best, 0.1 - 0.5, 0.2 - 0.7, 0.3 - 0.6)


def test_fluency_speed_and_cost_are_against_the_base_alone(rows: list[Row]) -> None:
    base, best, search = rows
    assert best.fluency_change == pytest.approx(-10.0)
    assert base.fluency_change == base.cost - 1 == 0
    assert base.answer_tokens_per_s == pytest.approx(60 / 3.0)
    assert base.sampled_tokens_per_s == pytest.approx(240 / 3.0)
    assert best.cost == pytest.approx((1.5 / 25) / (3.0 / 60))
    assert search.cost == pytest.approx(2.0)


def test_an_answer_without_tokens_has_no_fluency_and_counts_in_the_rest() -> None:
    answers = {BASE: [answer(0, 0.5), answer(1, 0.1, None, tokens=0)]}
    (row,) = measured("tiny", answers, BASE, None)
    assert row.fluency == -2.0
    assert row.reward.value == pytest.approx(0.3)


def test_distinct_ngrams_do_not_cross_from_one_text_to_the_next() -> None:
    assert distinct_ngrams(["a b a", "A b"], 1) == pytest.approx(2 / 5)
    assert distinct_ngrams(["a b a", "A b"], 2) == pytest.approx(2 / 3)
    assert distinct_ngrams(["a"], 2) == 1.0


def test_the_table_has_every_base_and_fits_100_columns(rows: list[Row]) -> None:
    both = rows + [replace(row, base="smollm2-135m-instruct") for row in rows]
    for ascii_only in (False, True):
        shown = io.StringIO()
        Console(width=100, file=shown).print(evaluation_table(both, "VADER", ascii_only))
        text = shown.getvalue()
        assert "…" not in text and "..." not in text
        assert "tiny" in text and "smollm2-135m-instruct" in text
        assert text.count("search") == 2
        assert text.isascii() or not ascii_only


def test_csv_and_json_hold_the_rows(rows: list[Row], tmp_path: Path) -> None:
    write_csv(rows, tmp_path / "t.csv")
    write_json(rows, {"task": "x"}, tmp_path / "t.json")
    with (tmp_path / "t.csv").open() as file:
        read = list(csv.DictReader(file))
    record = json.loads((tmp_path / "t.json").read_text())
    assert record["task"] == "x"
    assert [row["method"] for row in read] == [BASE, BEST_OF, "search"]
    for flat, stored, row in zip(read, record["rows"], rows, strict=True):
        assert flat.keys() == stored.keys()
        assert float(flat["reward"]) == stored["reward"] == row.reward.value
    assert read[0]["over_base"] == "" and record["rows"][0]["over_base"] is None


def test_plots_are_png_and_svg_and_the_same_for_the_same_numbers(
    rows: list[Row], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    both = rows + [replace(row, base="other") for row in rows]
    first = {path.suffix: path.read_bytes() for path in write_plots(both, "VADER", tmp_path / "a")}
    again = {path.suffix: path.read_bytes() for path in write_plots(both, "VADER", tmp_path / "b")}
    assert first == again
    assert first[".png"].startswith(b"\x89PNG")
    assert b"<svg" in first[".svg"] and b"</svg>" in first[".svg"]
