"""w2s-fast eval alpaca: answers to instructions, in files that alpaca_eval reads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import named, run
from tests.support.tiny_models import byte_tokenizer, save_tiny
from w2s_fast.demo import DemoModels

ROOT = Path(__file__).parents[2]
ALPACA = ROOT / "build" / "alpaca"  # `make alpaca` installs it there, apart from all else
SHORT = ("--max-new-tokens", "6", "--dtype", "float64")
SET = [
    {"instruction": "Name three colours.", "dataset": "helpful_base", "output": "of another model"},
    {"instruction": "Say hi\n\nto Émile.", "dataset": "koala"},
    {"instruction": "2 + 2?"},
]


@pytest.fixture
def instructions(tmp_path: Path) -> Path:
    path = tmp_path / "set.json"
    path.write_text(json.dumps(SET), encoding="utf-8")
    return path


def outputs_of(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / "outputs.json").read_text(encoding="utf-8"))
    return found


def answer(models: DemoModels, instructions: Path, out: Path, *more: str) -> str:
    given = ["--instructions", instructions, "--out", out, *named(models), *SHORT, *more]
    result = run("eval", "alpaca", *given)
    assert result.exit_code == 0, result.output
    return result.stderr


def test_outputs_are_answers_in_the_order_of_the_instructions(
    models: DemoModels, instructions: Path, tmp_path: Path
) -> None:
    told = answer(models, instructions, tmp_path / "out")
    assert "base has no chat template" in told
    outputs = outputs_of(tmp_path / "out")
    assert [each["instruction"] for each in outputs] == [row["instruction"] for row in SET]
    assert [each["dataset"] for each in outputs] == ["helpful_base", "koala", "unknown"]
    assert {each["generator"] for each in outputs} == {"w2s-fast, base"}
    lines = (tmp_path / "out" / "answers.jsonl").read_text().splitlines()
    by_index = {record["index"]: record for record in map(json.loads, lines)}
    assert [each["output"] for each in outputs] == [by_index[i]["text"] for i in range(3)]
    # What is there already is not computed again.
    told = answer(models, instructions, tmp_path / "out", "--resume", "--generator", "ours")
    assert "3 of 3 answers are in" in told
    again = outputs_of(tmp_path / "out")
    assert {each["generator"] for each in again} == {"ours"}
    assert [each["output"] for each in again] == [each["output"] for each in outputs]


def test_an_instruction_goes_through_the_bases_chat_template(
    models: DemoModels, tmp_path: Path
) -> None:
    reader = byte_tokenizer()
    reader.chat_template = (
        "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chatty = DemoModels(
        save_tiny(tmp_path / "base", tokenizer=reader), models.tuned, models.untuned
    )
    path = tmp_path / "set.json"
    outputs = []
    for out, m, text in (
        (tmp_path / "chat", chatty, "Say hi"),
        (tmp_path / "plain", models, "<user>Say hi<assistant>"),
    ):
        path.write_text(json.dumps([{"instruction": text}]))
        told = answer(m, path, out)
        assert ("no chat template" in told) == (m is models)
        outputs.append(outputs_of(out)[0]["output"])
    assert outputs[0] == outputs[1]


# The reference is the same outputs: alpaca_eval calls that a tie, and asks no model.
ANNOTATOR = """
test:
  prompt_template: PROMPT
  fn_completions: test_completions
  completions_kwargs: {model_name: none}
  fn_completion_parser: regex_parser
  completion_parser_kwargs: {outputs_to_match: {1: a, 2: b}}
"""
READS = """
import json, sys
import alpaca_eval
board, annotations = alpaca_eval.evaluate(
    model_outputs=sys.argv[1],
    reference_outputs=sys.argv[1],
    annotators_config=sys.argv[2],
    precomputed_leaderboard=None,
    output_path=None,
    fn_metric="get_winrate",
    sort_by="win_rate",
    is_return_instead_of_print=True,
    annotation_kwargs={},
)
print(json.dumps({"board": json.loads(board.to_json(orient="index")), "annotations": annotations}))
"""


@pytest.mark.long
def test_alpaca_evals_own_code_reads_the_outputs(
    models: DemoModels, instructions: Path, tmp_path: Path
) -> None:
    if not ALPACA.is_dir() and find_spec("alpaca_eval") is None:
        pytest.skip("alpaca_eval is not here: make alpaca")
    answer(models, instructions, tmp_path / "out", "--generator", "ours")
    environment = {**os.environ, "PYTHONPATH": str(ALPACA), "HF_HUB_OFFLINE": "1"}
    environment["OPENAI_API_KEY"] = "none"
    (tmp_path / "annotator").mkdir()
    prompt = tmp_path / "annotator" / "prompt.txt"
    prompt.write_text("{instruction} {output_1} {output_2}")
    (tmp_path / "annotator" / "configs.yaml").write_text(ANNOTATOR.replace("PROMPT", str(prompt)))
    paths = [str(tmp_path / name) for name in ("out/outputs.json", "annotator")]
    ran = subprocess.run(
        [sys.executable, "-c", READS, *paths], env=environment, capture_output=True, text=True,
        cwd=tmp_path,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    read = json.loads(ran.stdout.splitlines()[-1])
    assert list(read["board"]) == ["ours"]
    assert read["board"]["ours"]["n_total"] == 3
    assert {each["generator_2"] for each in read["annotations"]} == {"ours"}
    assert {each["instruction"] for each in read["annotations"]} == {
        row["instruction"] for row in SET
    }
    assert {each["output_2"] for each in read["annotations"]} == {
        each["output"] for each in outputs_of(tmp_path / "out")
    }
