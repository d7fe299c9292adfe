"""The files of a run: those that cannot be used, full disks, other models, other encodings."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import w2s_fast
from tests.support.command import SMALL, named, records, run, write_lines
from tests.support.gguf_files import gguf_llama, write_gguf
from w2s_fast.cli import app
from w2s_fast.demo import DemoModels


def no_engine(**options: Any) -> Any:
    raise AssertionError("models were loaded")


@pytest.mark.parametrize(
    ("input", "output", "told"),
    [
        ("none", "new", "none: No such file"),
        (".", "new", "is a folder"),
        ("in", "none/new", "none: No such file"),
        ("in", "in/new", "in/new: Not a directory"),
        ("in", ".", "is a folder"),
        ("in", "pipe", "is a pipe"),
        ("in", "/dev/null", "is a device"),
        ("in", "/dev/stdout", "records go to standard output"),
        ("in", "in", "are the same file"),
        ("in", "linked", "are the same file"),
        ("in", "old", "old exists: --resume"),
        ("pipe", "old", "reads its input twice"),
        ("in", "notes", "line 1 of .*notes is no record"),
    ],
)
def test_a_file_that_cannot_be_used_costs_no_loading_of_models(
    models: DemoModels,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    input: str,
    output: str,
    told: str,
) -> None:
    monkeypatch.setattr(w2s_fast, "Engine", no_engine)
    source = write_lines(tmp_path / "in", ['{"prompt": "a"}'])
    os.link(source, tmp_path / "linked")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "old").touch()
    write_lines(tmp_path / "notes", ["mine"])
    files = ["--input", tmp_path / input, "--output", tmp_path / output]
    if input == "pipe" or output == "notes":
        files.append("--resume")
    result = run("generate", *files, *named(models))
    assert result.exit_code == 2
    assert re.search(told, result.stderr)
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "new").exists()


def test_a_run_that_finds_no_models_leaves_no_output_behind(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", ['{"prompt": "a"}'])
    output = tmp_path / "out.jsonl"
    result = run(
        *("generate", "--input", source, "--output", output),
        *("--base", "/no/such/model", "--method", "sample"),
    )
    assert result.exit_code == 2
    assert "/no/such/model" in result.stderr
    assert not output.exists()


def test_other_models_do_not_go_on_with_an_output(models: DemoModels, tmp_path: Path) -> None:
    own = DemoModels(*(tmp_path / name for name in ("base", "tuned", "untuned")))
    for folder, copy in zip(vars(models).values(), vars(own).values()):
        shutil.copytree(folder, copy)
    source = write_lines(tmp_path / "in.jsonl", ['{"prompt": "a"}', '{"prompt": "b"}'])
    output = tmp_path / "out.jsonl"
    command = ["generate", "--input", source, "--output", output, "--resume", *SMALL]
    assert run(*command, *named(models)).exit_code == 0
    write_lines(output, output.read_text().splitlines()[:1])
    assert run(*command, *named(own), "--device", "cpu", "--page-size", "8").exit_code == 0
    assert len(records(output)) == 2

    shutil.copy(own.tuned / "model.safetensors", own.base)
    (own.untuned / "tokenizer_config.json").write_text("{}")
    result = run(*command, *named(own), "--weight", "2")
    assert result.exit_code == 2
    assert "error: cannot resume" in result.stderr
    for part in ("base weights: ", "untuned tokenizer: ", "guide weight: 1.0 then, 2.0 now"):
        assert part in result.stderr
    assert "tuned weights" not in result.stderr
    result = run(*command, *named(models), "--dtype", "float32")
    assert result.exit_code == 2
    assert "(dtype: float64 then, float32 now)" in result.stderr


def test_a_run_over_a_gguf_file_goes_on_with_the_same_file_only(tmp_path: Path) -> None:
    base = write_gguf(tmp_path / "base.gguf", gguf_llama())
    source = write_lines(tmp_path / "in.jsonl", ['{"prompt": "a"}', '{"prompt": "b"}'])
    output = tmp_path / "out.jsonl"
    command = ["generate", "--input", source, "--output", output, "--resume", *SMALL]
    command += ["--method", "sample", "--base"]
    assert run(*command, base).exit_code == 0
    write_lines(output, output.read_text().splitlines()[:1])
    moved = tmp_path / "folder" / "moved.gguf"
    moved.parent.mkdir()
    shutil.copy(base, moved)
    assert run(*command, moved.parent).exit_code == 0
    assert len(records(output)) == 2

    write_gguf(base, gguf_llama(seed=1))
    result = run(*command, base)
    assert result.exit_code == 2
    assert "cannot resume" in result.stderr and "base file: " in result.stderr


def test_a_full_disk_is_one_line_and_the_run_can_be_gone_on_with(
    models: DemoModels, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "in.jsonl", [f'{{"prompt": "{i}"}}' for i in range(4)])
    output = tmp_path / "out.jsonl"
    command = ["generate", "--input", source, "--output", output, "--resume"]
    command += [*named(models), *SMALL]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        full = run(*command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert full.exit_code == 2
    assert f"error: {output}: File too large" in full.stderr
    assert "--resume goes on" in full.stderr
    assert "Traceback" not in full.stderr
    assert 1 <= len(records(output)) < 4
    assert run(*command).exit_code == 0
    assert [record["index"] for record in records(output)] == [0, 1, 2, 3]


def test_records_on_stdout_are_utf8_whatever_the_terminal_says(
    models: DemoModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes('\ufeff{"prompt": "a", "id": "日本"}\r\n{"id": "ü"}'.encode())
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with pytest.raises(SystemExit) as exit:
        app(["generate", "--input", str(source), *named(models), *SMALL])
    assert exit.value.code == 1  # the second line has no prompt
    found = [json.loads(line) for line in raw.getvalue().decode("utf-8").splitlines()]
    assert {record["index"]: record["id"] for record in found} == {0: "日本", 1: "ü"}


def test_an_answer_that_the_terminal_cannot_show_is_shown_as_far_as_it_can(
    models: DemoModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="latin-1"))
    with pytest.raises(SystemExit) as exit:
        app(["generate", "x", "--temperature", "3", *named(models), *SMALL])
    assert exit.value.code == 0
    assert b"?" in raw.getvalue()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("form", ["text", "records", "help"])
def test_a_full_disk_behind_stdout_is_one_line(
    models: DemoModels,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    form: str,
) -> None:
    source = write_lines(tmp_path / "in.jsonl", ['{"prompt": "a"}'])
    forms = {"text": ["x"], "records": ["--input", str(source)], "help": ["--help"]}
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as exit:
            app(["generate", *forms[form], *named(models), *SMALL])
    assert exit.value.code == 2
    told = capfd.readouterr().err
    assert told.splitlines()[-1].startswith("error: standard output: No space left on device")
    assert "Traceback" not in told


def test_a_reader_that_has_gone_away_ends_the_run_quietly(
    models: DemoModels,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    source = write_lines(tmp_path / "in.jsonl", ['{"prompt": "a"}'])
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as exit:
            app(["generate", "--input", str(source), *named(models), *SMALL])
    assert exit.value.code == 141
    told = capfd.readouterr().err
    assert not any(word in told for word in ("Traceback", "rror", "answered"))
