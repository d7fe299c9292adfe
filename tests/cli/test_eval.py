"""w2s-fast eval: tables over tiny models, and what an interruption leaves."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from tests.evaluate.test_rewards import save_classifier
from tests.support.command import named, run, write_lines
from tests.support.gguf_files import merging_tokenizer
from tests.support.tiny_models import save_tiny
from w2s_fast.demo import DemoModels

SHORT = ("--max-new-tokens", "6", "--dtype", "float64", "--plain")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "prompts.txt", ["The film", "A book", "My phone"])


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "table.csv").open() as file:
        return list(csv.DictReader(file))


def answers_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_sentiment_compares_all_methods_on_several_bases(
    models: DemoModels, prompts: Path, tmp_path: Path
) -> None:
    other = save_tiny(tmp_path / "other", seed=7)
    out = tmp_path / "out"
    options = ["--prompts", prompts, "--out", out, "--base", str(other), "--seeds", "2", "--tree"]
    result = run("eval", "sentiment", *named(models), *options, *SHORT)
    assert result.exit_code == 0, result.output
    rows = rows_of(out)
    assert [row["base"] for row in rows] == ["base"] * 12 + ["other"] * 12
    assert len({row["method"] for row in rows}) == 12
    assert {(row["prompts"], row["seeds"]) for row in rows} == {("3", "2")}
    for base in ("base", "other"):
        answers = answers_of(out / f"{base}-answers.jsonl")
        assert len(answers) == 12 * 3 * 2
        assert all(answer["seconds"] > 0 and answer["fluency"] < 0 for answer in answers)
        # Prompts and seeds do not share their noise.
        plain = {answer["text"] for answer in answers if answer["id"].startswith("base, ")}
        assert len(plain) == 6
    table = json.loads((out / "table.json").read_text())
    assert table["task"] == "sentiment" and len(table["rows"]) == 24
    assert table["made_by"]["base"] != table["made_by"]["other"]
    assert (out / "plot.png").is_file() and (out / "plot.svg").is_file()
    assert result.stdout.count("round 1: 16 candidates") == 2  # a tree for each base
    assert "gold reward: VADER" in result.stdout


def test_guides_of_another_vocabulary_are_compared_without_fused_logits(
    models: DemoModels, prompts: Path, tmp_path: Path
) -> None:
    reader = merging_tokenizer()
    base = save_tiny(tmp_path / "merging", tokenizer=reader, vocab_size=len(reader))
    names = ["--base", base, "--tuned", models.tuned, "--untuned", models.untuned]
    options = ["--prompts", prompts, "--out", tmp_path / "out", "--short"]
    result = run("eval", "sentiment", *names, *options, *SHORT)
    assert result.exit_code == 0, result.output
    assert "left out EFT beta=1: fusion adds logits token by token" in result.stderr
    methods = [row["method"] for row in rows_of(tmp_path / "out")]
    assert methods == ["base", "best-of-16", "CBS W=4 K=4"]


def test_an_interrupted_evaluation_goes_on_and_comes_out_the_same(
    models: DemoModels, prompts: Path, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = ["--prompts", prompts, "--short", *named(models), *SHORT]
    assert run("eval", "sentiment", "--out", whole, *options).exit_code == 0
    lines = (whole / "base-answers.jsonl").read_bytes().splitlines(keepends=True)
    cut.mkdir()
    (cut / "base-answers.jsonl").write_bytes(b"".join(lines[:5]) + lines[5][:40])
    refused = run("eval", "sentiment", "--out", cut, *options)
    assert refused.exit_code == 2 and "--resume goes on" in refused.stderr
    result = run("eval", "sentiment", "--out", cut, "--resume", *options)
    assert result.exit_code == 0, result.output
    assert f"5 of {len(lines)} answers are in" in result.stderr
    for a, b in zip(rows_of(whole), rows_of(cut), strict=True):
        for name in ("base", "method", "reward", "fluency", "over_best_of_n", "distinct_2"):
            assert a[name] == b[name]
    other = run("eval", "sentiment", "--out", cut, "--resume", "--seed", "1", *options)
    assert other.exit_code == 2 and "with another prompt or other parameters" in other.stderr


def test_a_guide_without_an_untuned_model_is_fused_but_not_dynamically(
    models: DemoModels, prompts: Path, tmp_path: Path
) -> None:
    names = ["--base", models.base, "--tuned", models.tuned, "--untuned", "none"]
    options = ["--prompts", prompts, "--count", "2", "--out", tmp_path / "out", "--no-ablation"]
    result = run("eval", "sentiment", *names, *options, "--betas", "1", *SHORT)
    assert result.exit_code == 0, result.output
    methods = [row["method"] for row in rows_of(tmp_path / "out")]
    assert methods == ["base", "best-of-16", "EFT beta=1", "CBS W=4 K=4", "CBS W=4 K=4, fused"]


def test_an_evaluation_can_be_gone_on_with_over_more_prompts(
    models: DemoModels, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ["--prompts", prompts, "--out", out, "--short", *named(models), *SHORT]
    assert run("eval", "sentiment", "--count", "2", *options).exit_code == 0
    first = answers_of(out / "base-answers.jsonl")
    result = run("eval", "sentiment", "--resume", *options)
    assert result.exit_code == 0, result.output
    assert "8 of 12 answers are in" in result.stderr
    assert answers_of(out / "base-answers.jsonl")[:8] == first
    assert {row["prompts"] for row in rows_of(out)} == {"3"}


def test_summaries_are_ranked_by_the_reward_model_that_is_named(
    models: DemoModels, tmp_path: Path
) -> None:
    posts = write_lines(tmp_path / "posts.jsonl", ['{"post": "A long day"}', '{"prompt": "x"}'])
    gold = save_classifier(tmp_path / "gold", 1)
    options = ["--data", posts, "--gold-model", gold, "--out", tmp_path / "out", "--short"]
    result = run("eval", "summarization", *named(models), *options, *SHORT)
    assert result.exit_code == 0, result.output
    assert f"gold reward: {gold}" in " ".join(result.stdout.split())
    rows = rows_of(tmp_path / "out")
    assert [row["prompts"] for row in rows] == ["2"] * 4
    assert any(abs(float(row["reward"])) > 1e-3 for row in rows)


def test_what_cannot_be_evaluated_is_refused_before_models_are_loaded(
    models: DemoModels, prompts: Path, tmp_path: Path
) -> None:
    out = ["--out", tmp_path / "out"]
    base = ["--base", models.base]
    for given, said in (
        (base, "steering needs --tuned"),
        (["--real", *base], "--real names all models"),
        (["--prompts", tmp_path / "nowhere.txt", *named(models)], "nowhere.txt"),
        (["--betas", "one", *named(models)], "--betas"),
        (["--out", prompts, *named(models)], "is a file"),
        (["--gold-model", tmp_path / "nowhere", *named(models)], "sequence classifier"),
    ):
        result = run("eval", "sentiment", *out, *given)
        assert result.exit_code == 2, result.output
        assert said in " ".join(result.output.split())


def test_the_real_models_have_to_be_fetched_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    result = run("eval", "sentiment", "--real", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "w2s-fast fetch-models smollm2-135m-instruct" in result.stderr
