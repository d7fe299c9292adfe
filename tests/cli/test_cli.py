"""The command line: what it says, what it writes, and how it fails."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import w2s_fast.demo
from tests.support.command import SMALL, named, records, run, write_lines
from w2s_fast import Engine
from w2s_fast.demo import DemoModels

COMMAND = [sys.executable, "-m", "w2s_fast.cli"]
LINES = 80  # of the interrupted run: 16 are under way at once


@pytest.fixture
def bundled(models: DemoModels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the tiny models where the bundled ones are."""
    monkeypatch.setattr(w2s_fast.demo, "demo_model_paths", lambda: models)


# --- generate, one prompt


def test_without_a_model_the_bundled_ones_answer_and_it_says_so(bundled: None) -> None:
    result = run("generate", "The film", *SMALL)
    assert result.exit_code == 0
    assert "no model named: using the bundled demo models" in result.stderr
    assert "bundled" not in result.stdout


def test_with_models_named_it_says_nothing_of_bundled_ones(models: DemoModels) -> None:
    result = run("generate", "The film", *named(models), *SMALL)
    assert result.exit_code == 0
    assert "bundled" not in result.stderr
    assert result.stdout.strip()


def test_a_terminal_is_told_what_each_model_is(
    models: DemoModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes anything for a terminal then
    told = run("generate", "The film", *named(models), *SMALL).stderr
    for path in (models.base, models.tuned, models.untuned):
        assert f"reading {path}" in told
    of_one = r"LlamaForCausalLM, [\d,]+ parameters, float64, on cpu: \d+\.\d s"
    assert len(re.findall(of_one, told)) == 3
    monkeypatch.delenv("FORCE_COLOR")
    result = run("generate", "The film", *named(models), *SMALL)
    assert "reading" not in result.output and "Llama" not in result.output


def test_guides_may_lie_on_a_device_of_their_own(models: DemoModels) -> None:
    here = run("generate", "The film", *named(models), *SMALL, "--device", "cpu")
    there = run("generate", "The film", *named(models), *SMALL, "--guide-device", "cpu")
    assert there.exit_code == 0 and there.stdout == here.stdout
    nowhere = run("generate", "The film", *named(models), *SMALL, "--guide-device", "nowhere")
    assert nowhere.exit_code == 2 and "device 'nowhere' cannot be used" in nowhere.stderr


def test_json_is_one_record_with_all_hypotheses(models: DemoModels) -> None:
    result = run("generate", "The film", "--json", "-n", "3", *named(models), *SMALL)
    record = json.loads(result.stdout)
    assert len(record["hypotheses"]) == 3
    assert record["token_ids"] == record["hypotheses"][0]["token_ids"]
    scores = [hypothesis["score"] for hypothesis in record["hypotheses"]]
    assert scores == sorted(scores, reverse=True)
    assert record["usage"]["sampled_tokens"] > 0


def test_every_option_reaches_the_search(models: DemoModels) -> None:
    options = "--method bon --successors 3 -n 2 --seed 5 --temperature 0.9 --top-k 7 --top-p 0.9"
    options += " --min-p 0.01 --score mean --finished replicate --dedup --chunk-length none"
    options += " --selection resample --tau 0.5"
    first, again = (
        run("generate", "x", "--json", *options.split(), *named(models), *SMALL) for _ in range(2)
    )
    assert first.exit_code == 0
    assert len(json.loads(first.stdout)["hypotheses"]) == 2
    assert first.stdout == again.stdout


def test_widths_by_round_reach_the_search(models: DemoModels) -> None:
    options = "--json --trace --beam-width 6,3,1 --successors 1,2 --chunk-length 3,2,none"
    result = run("generate", "x", *options.split(), *named(models), *SMALL)
    rounds = json.loads(result.stdout)["trace"]["rounds"]
    assert [len(one["candidates"]) for one in rounds][:2] == [6, 12]
    assert [len(one["kept"]) for one in rounds][:2] == [6, 3]


def test_logits_are_fused_as_asked(models: DemoModels) -> None:
    def found(*options: str) -> Any:
        common = ["--json", "--temperature", "1", *named(models), *SMALL]
        result = run("generate", "x", *common, *options)
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    plain = found("--method", "sample")
    assert found("--method", "fusion", "--beta", "0")["token_ids"] == plain["token_ids"]
    fused = found("--method", "fusion", "--beta", "40")
    assert fused["token_ids"] != plain["token_ids"] and fused["score"] > 0
    greedy = found("--method", "fusion", "--beta", "0", "--plausibility", "1")
    assert greedy["token_ids"] == found("--method", "sample", "--top-k", "1")["token_ids"]
    assert found("--method", "dynamic_fusion")["score"] is not None
    ranked = found("--method", "bon", "--proposal", "fusion", "--successors", "2", "--beta", "40")
    assert ranked["score"] >= fused["score"]


def test_answers_end_at_stop_strings(models: DemoModels) -> None:
    def found(*options: str) -> Any:
        common = ["--json", "--method", "sample", *named(models), *SMALL]
        result = run("generate", "The film", *common, *options)
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    whole = found()["text"]
    letter = whole[len(whole) // 2]
    cut, kept = (
        found("--stop", "#####", "--stop", letter),
        found("--stop", letter, "--include-stop"),
    )
    assert cut["text"] == whole.split(letter)[0] and cut["finish_reason"] == "stop"
    assert kept["text"] == cut["text"] + letter
    least = found("--stop", letter, "--min-new-tokens", "2")["text"]
    assert len(least) >= len(cut["text"])
    assert run("generate", "x", "--stop", "", *named(models)).exit_code == 2


def test_chunks_end_at_strings(models: DemoModels) -> None:
    def first_round(*options: str) -> list[list[int]]:
        common = ["--json", "--trace", "--chunk-length", "none", *named(models), *SMALL]
        result = run("generate", "The film", *common, *options)
        assert result.exit_code == 0, result.stderr
        texts.append(json.loads(result.stdout)["text"])
        candidates = json.loads(result.stdout)["trace"]["rounds"][0]["candidates"]
        return [candidate["token_ids"] for candidate in candidates]

    texts: list[str] = []
    plain = first_round()
    assert plain == first_round("--chunk-stop", "#####")
    begun = first_round("--chunk-stop", "#####", "--chunk-stop", texts[0][0])
    assert plain != begun and all(a[: len(b)] == b for a, b in zip(plain, begun, strict=True))
    assert run("generate", "x", "--chunk-stop", "", *named(models)).exit_code == 2


def test_a_guide_may_have_no_untuned_model(models: DemoModels) -> None:
    alone = ["--base", str(models.base), "--tuned", str(models.tuned), "--untuned", "none"]
    result = run("generate", "x", "--json", *alone, *SMALL)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["score"] < 0  # a log-prob
    refused = run("generate", "x", *alone, "--method", "dynamic_fusion", *SMALL)
    assert refused.exit_code != 0 and "dynamic_fusion compares" in refused.stderr


def test_beams_are_searched_with_their_own_options(models: DemoModels) -> None:
    def scores(*options: str) -> list[float]:
        beam = ["--method", "beam", "--beam-width", "3", "-n", "3", *options]
        result = run("generate", "x", "--json", *beam, *named(models), *SMALL)
        assert result.exit_code == 0
        return [hypothesis["score"] for hypothesis in json.loads(result.stdout)["hypotheses"]]

    assert scores() == sorted(scores(), reverse=True)
    # Log-probs of whole responses, and of a token.
    assert max(scores("--length-penalty", "0")) < min(scores())
    assert len(scores("--early-stopping", "never")) == len(scores("--early-stopping", "true")) == 3
    refused = run("generate", "x", "--early-stopping", "soon", *named(models), *SMALL)
    assert refused.exit_code == 2


def test_the_machine_options_reach_the_engine(
    models: DemoModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def engine(**options: Any) -> Any:
        seen.update(options)
        return Engine(**options)

    monkeypatch.setattr(w2s_fast, "Engine", engine)
    options = ["--attention", "torch", "--page-size", "8", "--kv-cache-tokens", "2048"]
    options += ["--no-cuda-graphs", "--max-rows", "48", "--max-pass-tokens", "7"]
    assert run("generate", "x", *options, *named(models), *SMALL).exit_code == 0
    assert (seen["attention"], seen["page_size"], seen["kv_cache_tokens"]) == ("torch", 8, 2048)
    assert seen["cuda_graphs"] is False and seen["compile"] is False and seen["max_rows"] == 48
    assert seen["max_pass_tokens"] == 7


def test_compilation_without_recorded_passes_is_refused(models: DemoModels) -> None:
    result = run("generate", "x", "--compile", "--device", "cpu", *named(models))
    assert result.exit_code == 2
    assert "compile=True needs recorded passes: a CUDA device" in result.stderr


def test_attention_that_cannot_run_here_is_refused_with_the_reason(models: DemoModels) -> None:
    result = run("generate", "x", "--attention", "flash", "--device", "cpu", *named(models))
    assert result.exit_code == 2
    assert "runs on CUDA devices, and this is cpu" in result.stderr


def test_trace_shows_the_search_tree(models: DemoModels) -> None:
    result = run("generate", "The film", "--trace", *named(models), *SMALL)
    assert "round 1: 16 candidates from the prompt, 4 kept" in result.stdout
    assert "★ a" in result.stdout


def test_sampling_needs_no_guides(models: DemoModels) -> None:
    alone = ["--base", str(models.base)]
    assert run("generate", "x", *alone, "--method", "sample", *SMALL).exit_code == 0
    steered = run("generate", "x", *alone, *SMALL)
    assert steered.exit_code == 2
    assert "--tuned" in steered.stderr


# --- errors


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["generate"], "PROMPT"),
        (["generate", "x", "--input", "y"], "PROMPT"),
        (["generate", "x", "--output", "y"], "--output goes with --input"),
        (["generate", "--input", "x", "--resume"], "--output"),
        (["generate", "--input", "x", "--output", "y", "--retry-errors"], "--resume"),
        (["generate", "x", "--tuned", "y"], "--base"),
        (["generate", "x", "--base", "y", "--tuned", "z"], "--untuned"),
        (["generate", "x", "--chunk-length", "many"], "many"),
        (["generate", "x", "--beam-width", "8,,2"], "8,,2"),
        (["generate", "x", "--beam-width", "none"], "none"),
        (["generate", "x", "--successors", "4,0"], "error: successors is 0"),
        (["generate", "x", "--method", "magic"], "magic"),
        (["generate", "x", "--selection", "best"], "best"),
        (["generate", "x", "--tau", "0"], "error: tau is 0.0"),
        (["generate", "x", "--temperature", "-1"], "error: temperature is -1.0"),
        (["generate", "x", "-n", "9"], "error: n is 9"),
        (["generate", "--input", "/no/such/file"], "error: /no/such/file: No such file"),
        (["generate", "x", "--base", "/no/such/model", "--method", "sample"], "/no/such/model"),
    ],
)
def test_a_mistake_is_one_clear_message_and_exit_code_2(
    arguments: list[str], told: str, bundled: None
) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert told in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_broken_model_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    result = run("generate", "x", "--base", tmp_path, "--method", "sample")
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert str(tmp_path) in line


# --- generate, files


def test_bad_lines_get_error_records_and_their_neighbours_answers(
    models: DemoModels, tmp_path: Path
) -> None:
    lines = ['{"prompt": "a", "id": "first"}', "{", '{"prompt": "a", "seed": 9}', '{"prompt": 1}']
    lines += ['{"prompt": [999999]}', '{"prompt": "a", "n": 2, "trace": true}']
    source = write_lines(tmp_path / "in.jsonl", lines)
    output = tmp_path / "out.jsonl"
    result = run("generate", "--input", source, "--output", output, *named(models), *SMALL)
    assert result.exit_code == 1
    assert "3 answered, 3 failed" in result.stderr
    found = records(output)
    assert ["error" in record for record in found] == [False, True, False, True, True, False]
    assert found[0]["id"] == "first"
    assert found[0]["token_ids"] != found[2]["token_ids"]
    assert len(found[5]["hypotheses"]) == 2
    assert found[5]["trace"]["rounds"]
    alone = run("generate", "a", "--json", "--seed", "9", *named(models), *SMALL)
    assert json.loads(alone.stdout)["token_ids"] == found[2]["token_ids"]


def test_without_an_output_records_go_to_stdout(models: DemoModels, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", ['{"prompt": "a"}', '{"prompt": "b"}'])
    result = run("generate", "--input", source, *named(models), *SMALL)
    assert result.exit_code == 0
    assert {json.loads(line)["index"] for line in result.stdout.splitlines()} == {0, 1}


def test_an_existing_output_is_refused(models: DemoModels, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", ['{"prompt": "a"}'])
    output = write_lines(tmp_path / "out.jsonl", ["precious"])
    for flags in ([], ["--resume"]):
        result = run("generate", "--input", source, "--output", output, *flags, *named(models))
        assert result.exit_code == 2
    assert output.read_text() == "precious\n"


@pytest.fixture(scope="module")
def long_command(models: DemoModels, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """One that can be interrupted, but for its output."""
    lines = [json.dumps({"prompt": f"prompt {i}", "seed": i}) for i in range(LINES)]
    lines[1] = "not json"
    source = write_lines(tmp_path_factory.mktemp("long") / "in.jsonl", lines)
    return ["generate", "--input", str(source), *named(models), *SMALL]


@pytest.fixture(scope="module")
def undisturbed(
    long_command: list[str], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What that command writes where nothing interrupts it."""
    output = tmp_path_factory.mktemp("undisturbed") / "out.jsonl"
    run(*long_command, "--output", output)
    return records(output)


@pytest.mark.parametrize(
    "stop", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.thorough)]
)
def test_an_interrupted_run_is_resumed_without_loss(
    long_command: list[str],
    undisturbed: list[dict[str, Any]],
    tmp_path: Path,
    stop: signal.Signals,
) -> None:
    command, output = long_command, tmp_path / "out.jsonl"
    few_threads = {**os.environ, "OMP_NUM_THREADS": "1"}
    # A shell ignores SIGINT for what it runs in the background, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(
        [*COMMAND, *command, "--output", str(output)], env=few_threads
    ) as process:
        deadline = time.monotonic() + 120
        while not output.exists() or output.read_bytes().count(b"\n") < 5:
            assert process.poll() is None, "ended before it could be interrupted"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(stop)
    assert process.returncode == (130 if stop == signal.SIGINT else -stop)
    kept = output.read_bytes()
    done = kept.count(b"\n")
    assert 5 <= done < LINES
    with output.open("ab") as file:
        file.write(b'{"index": 79, "text": "half a li')

    assert run(*command, "--output", output).exit_code == 2
    other = run(*command, "--output", output, "--resume", "--seed", "1", "--temperature", "0.1")
    assert other.exit_code == 2
    assert "cannot resume" in other.stderr

    resumed = run(*command, "--output", output, "--resume")
    assert resumed.exit_code == 1  # line 1 is no JSON
    assert "cut off a half-written last line" in resumed.stderr
    assert f"{done} lines are in {output} already" in resumed.stderr
    assert output.read_bytes().startswith(kept)
    found = records(output)
    assert [r["index"] for r in found] == list(range(LINES))
    for ours, theirs in zip(found, undisturbed, strict=True):
        assert ours.pop("score", None) == pytest.approx(theirs.get("score"))
        assert ours == {name: value for name, value in theirs.items() if name != "score"}


# --- doctor, demo, help


def test_doctor_finds_nothing_wrong(bundled: None) -> None:
    result = run("doctor")
    assert result.exit_code == 0, result.stdout
    lines = result.stdout.splitlines()
    assert lines[-1] == "all well"
    assert all(re.match(r"(ok|none) ", line) for line in lines[:-1])
    for name in ("cpu", "memory", "gpu", "torch", "page manager", "attention", "self-check"):
        assert any(line[5:].startswith(name) for line in lines), name
    assert any(re.search("dtype +auto: float32, on cpu", line) for line in lines)
    assert any(re.search("rows +auto: 256 candidates in a step", line) for line in lines)
    for backend in ("triton", "flash", "torch"):  # each with where it runs, or why it cannot
        assert any(re.match(rf"(ok|none) +attention {backend} +\w.* ", line) for line in lines)


def test_doctor_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = DemoModels(tmp_path / "no", tmp_path / "no", tmp_path / "no")
    monkeypatch.setattr(w2s_fast.demo, "demo_model_paths", lambda: nowhere)
    result = run("doctor")
    assert result.exit_code == 1
    assert "not well: self-check" in result.stdout


def test_demo_shows_table_answers_and_tree_in_100_columns(bundled: None) -> None:
    result = run("demo", "--prompts", "3", "--plain")
    assert result.exit_code == 0, result.stderr
    for words in ("3 held-out prompts", "base alone", "best-of-16", "CBS W=4 K=4 L=5", "round 12"):
        assert words in result.stdout
    assert "w2s-fast demo --prompts 3 --seed 0" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100
    assert "\x1b" not in result.stdout


def test_help_is_there_before_torch_is() -> None:
    script = (
        "import sys; from w2s_fast.cli import app\n"
        "try: app(['generate', '--help'])\n"
        "finally: print({'torch', 'transformers'} & set(sys.modules), file=sys.stderr)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert answer.stderr.strip() == "set()"
    assert "--beam-width" in answer.stdout


def test_version() -> None:
    assert re.match(r"w2s-fast \d+\.\d+\.\d+", run("--version").stdout)
