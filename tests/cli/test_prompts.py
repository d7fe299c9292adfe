"""How prompts reach the models: as text, as messages, by templates; from a file or from a pipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import w2s_fast
from tests.support.command import SMALL, named, run, write_lines
from tests.support.engines import tiny_engine
from tests.support.tiny_models import byte_tokenizer, save_tiny
from w2s_fast import SearchParams
from w2s_fast.cli.batch import at_once
from w2s_fast.demo import DemoModels

TEMPLATE = "<bos>{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}answer: "
WARNS = "the model has a chat template"


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> DemoModels:
    """Models of which the base has a chat template."""
    folder = tmp_path_factory.mktemp("chatty")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    base = save_tiny(folder / "base", tokenizer=tokenizer)
    return DemoModels(base, *(save_tiny(folder / name, seed=1 + len(name)) for name in ("t", "un")))


def record(models: DemoModels, *options: str | Path) -> dict[str, Any]:
    result = run("generate", "--json", *options, *named(models), *SMALL)
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def answers(models: DemoModels, lines: list[str], *options: str) -> list[dict[str, Any]]:
    """From standard input, by index."""
    text = "".join(line + "\n" for line in lines)
    result = run("generate", "--input", "-", *options, *named(models), *SMALL, stdin=text)
    found = [json.loads(line) for line in result.stdout.splitlines()]
    return sorted(found, key=lambda each: int(each["index"]))


# --- chats


def test_a_chat_is_a_users_message_behind_a_system_message(chatty: DemoModels) -> None:
    asked = record(chatty, "Hi", "--chat")
    assert asked["token_ids"] == record(chatty, "user: Hi\nanswer: ")["token_ids"]
    both = record(chatty, "Hi", "--system", "Be brief.")
    assert both["token_ids"] == record(chatty, "system: Be brief.\nuser: Hi\nanswer: ")["token_ids"]
    assert both["token_ids"] != asked["token_ids"]
    assert both["usage"]["prompt_tokens"] > asked["usage"]["prompt_tokens"]


def test_a_file_may_hold_messages_or_be_put_as_them(chatty: DemoModels) -> None:
    messages = '[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]'
    lines = ['{"prompt": "Hi"}', f'{{"messages": {messages}}}', f'{{"prompt": {messages}}}']
    found = answers(chatty, lines, "--system", "Be brief.")
    assert found[0]["token_ids"] == found[1]["token_ids"] == found[2]["token_ids"]
    assert answers(chatty, lines[:1])[0]["token_ids"] != found[0]["token_ids"]


def test_messages_that_are_none_are_errors_of_their_lines(chatty: DemoModels) -> None:
    message = '{"role": "user", "content": "Hi"}'
    lines = ['{"messages": "Hi"}', '{"messages": []}', f'{{"messages": {message}}}']
    lines += [f'{{"messages": [{message}], "prompt": "Hi"}}', f'{{"messages": [{message}]}}']
    found = answers(chatty, lines)
    told = [each.get("error", {"message": ""})["message"] for each in found]
    assert all("messages must be a list of chat messages" in each for each in told[:3])
    assert "a prompt and messages" in told[3] and not told[4]


def test_without_a_template_chats_are_refused_before_models_are_loaded(
    models: DemoModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_engine(**options: Any) -> Any:
        raise AssertionError("models were loaded")

    monkeypatch.setattr(w2s_fast, "Engine", no_engine)
    result = run("generate", "Hi", "--chat", *named(models))
    assert result.exit_code == 2
    assert f"base ({models.base}) has no chat template" in result.stderr
    result = run("generate", "Hi", "--method", "dynamic_fusion", "--base", str(models.base),
                 "--tuned", str(models.tuned), "--untuned", "none")  # fmt: skip
    assert result.exit_code == 2 and "guides that have both" in result.stderr


def test_logits_of_other_vocabularies_are_refused_before_models_are_loaded(
    models: DemoModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_engine(**options: Any) -> Any:
        raise AssertionError("models were loaded")

    other = save_tiny(tmp_path / "other", tokenizer=byte_tokenizer(eos="</s>"))
    foreign = DemoModels(models.base, other, other)
    assert run("generate", "Hi", "--method", "fusion", *named(models), *SMALL).exit_code == 0
    monkeypatch.setattr(w2s_fast, "Engine", no_engine)
    for options in (["--method", "fusion"], ["--method", "bon", "--proposal", "fusion"]):
        result = run("generate", "Hi", *options, *named(foreign), *SMALL)
        assert result.exit_code == 2
        assert f"it needs one vocabulary: tuned ({other})" in result.stderr


def test_plain_text_for_a_chat_model_is_told_once(chatty: DemoModels, models: DemoModels) -> None:
    def told(models: DemoModels, *options: str, stdin: str | None = None) -> int:
        result = run("generate", *options, *named(models), *SMALL, stdin=stdin)
        assert result.exit_code == 0 and WARNS not in result.stdout
        return result.stderr.count(WARNS)

    lines = '{"prompt": "Hi"}\n' * 3
    assert told(chatty, "Hi") == told(chatty, "--input", "-", stdin=lines) == 1
    assert told(chatty, "Hi", "--chat") == told(models, "Hi") == 0
    assert told(chatty, "--input", "-", "--chat", stdin=lines) == 0
    assert told(chatty, "Hi", "--prompt-template", "Q: {prompt}") == 0


# --- templates, tokenizers, ends


def test_templates_stand_around_plain_prompts(chatty: DemoModels) -> None:
    around = "<bos>Q: {prompt}"
    plain = record(chatty, "Q: Hi")
    both = record(chatty, "Hi", "--prompt-template", around, "--guide-prompt-template", around)
    assert both["token_ids"] == plain["token_ids"] and both["score"] == plain["score"]
    of_base = record(chatty, "Hi", "--prompt-template", around)
    assert of_base["made_by"]["base prompt template"] == around
    assert of_base["score"] != plain["score"]
    for wrong in (["--prompt-template", "Q:"], ["--guide-prompt-template", "{prompt}"] * 2):
        result = run("generate", "Hi", *wrong, *named(chatty), *SMALL)
        assert result.exit_code == 2 and "prompt" in result.stderr


def test_a_tokenizer_may_lie_elsewhere(chatty: DemoModels, tmp_path: Path) -> None:
    alone = save_tiny(tmp_path / "base")
    for path in alone.glob("tokenizer*"):
        path.unlink()
    models = DemoModels(alone, chatty.tuned, chatty.untuned)
    elsewhere = ["--tokenizer", str(chatty.base)]
    found, wanted = record(models, "Hi", "--chat", *elsewhere), record(chatty, "Hi", "--chat")
    assert found["token_ids"] == wanted["token_ids"] and found["text"] == wanted["text"]
    assert "base tokenizer" in found["made_by"]
    result = run("generate", "Hi", "--tokenizer", alone, *named(models), *SMALL)
    assert result.exit_code == 2 and f"--tokenizer {alone}: there is no tokenizer" in result.stderr


def test_answers_end_at_tokens_or_go_on_behind_eos(models: DemoModels) -> None:
    sample = ["x", "--method", "sample", "--temperature", "3"]
    whole = record(models, *sample, "--ignore-eos")["token_ids"]
    assert len(whole) == 10
    stop = whole[4]
    ended = record(models, *sample, "--ignore-eos", "--stop-token-id", str(stop))
    assert ended["token_ids"] == whole[: whole.index(stop) + 1]
    assert ended["finish_reason"] == "stop"
    result = run("generate", "x", "--stop-token-id", "999", *named(models), *SMALL)
    assert result.exit_code == 2 and "stop_token_ids holds 999" in result.stderr


# --- standard input


def test_standard_input_is_read_and_an_output_written(models: DemoModels, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    line = json.dumps({"prompt": "Grüße", "id": 7}, ensure_ascii=False)
    files = ["--input", "-", "--output", output, *named(models), *SMALL]
    result = run("generate", *files, "--resume", stdin=line)  # nothing is there yet
    assert result.exit_code == 0, result.stderr
    assert [json.loads(one)["id"] for one in output.read_text().splitlines()] == [7]
    again = run("generate", *files, "--resume", stdin=line)
    assert again.exit_code == 2 and "reads its input twice" in again.stderr
    assert run("generate", *files, stdin=line).exit_code == 2


def test_a_batch_in_a_terminal_says_how_far_it_has_come(
    models: DemoModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_lines(tmp_path / "in.jsonl", ['{"prompt": "a"}', "", "{", '{"prompt": "b"}'])
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes anything for a terminal then
    monkeypatch.setenv("COLUMNS", "100")
    result = run("generate", "--input", source, *named(models), *SMALL)
    told = result.stderr
    assert "0 of 3 answered, 0 failed" in told and "2 of 3 answered, 1 failed" in told
    assert "tokens/s sampled" in told and " left" in told


@pytest.mark.parametrize(
    ("params", "begin"),
    [
        (SearchParams(), 1),  # room for 4, of 10 rounds each
        (SearchParams(max_new_tokens=10), 2),
        (SearchParams(max_new_tokens=5), 4),
        (SearchParams(method="sample", max_new_tokens=50), 16),  # room for 64, of 4 steps each
        (SearchParams(method="bon", successors=100), 1),
    ],
)
def test_of_a_file_so_many_begin_at_once_that_answers_come_one_after_the_other(
    params: SearchParams, begin: int
) -> None:
    assert at_once(tiny_engine(max_rows=64), params) == begin
