"""`--base-url`: the command over somebody else's server, with guides here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.command import records, run, write_lines
from tests.support.scripted_server import MORE, Script, scripted
from w2s_fast import Engine, Guide, RemoteBase, SearchParams
from w2s_fast.demo import demo_model_paths

KEY = "sk-in-an-environment"
SEARCH = ["--beam-width", "2", "--successors", "2", "--chunk-length", "4", "--max-new-tokens", "12"]


@pytest.fixture(scope="module")
def shared() -> Iterator[Script]:
    with scripted(key=KEY) as found:
        yield found


@pytest.fixture
def server(shared: Script, monkeypatch: pytest.MonkeyPatch) -> Script:
    shared.begin()
    monkeypatch.setenv("THE_KEY", KEY)
    return shared


def at(server: Script) -> list[str]:
    return ["--base-url", server.url, "--base-model", "words", "--api-key-env", "THE_KEY"]


def test_a_running_server_is_steered_by_the_bundled_guides(server: Script) -> None:
    result = run("generate", "the film", *at(server), *SEARCH, "--price-per-million", "1e6,2e6")
    assert result.exit_code == 0, result.output
    assert "using the bundled guides" in result.stderr
    assert f"{server.url} (model words): texts and chats" in result.stderr
    found = re.search(
        r"(\d+) requests to the server: (\d+) tokens read \(\d+ of them cached\), (\d+) sampled, "
        r"cost ([\d.e+]+)",
        result.stderr,
    )
    assert found is not None, result.stderr
    asked = [each for each in server.asked if each.text.startswith("the film")]
    assert int(found[1]) == len(asked)
    assert int(found[3]) <= 4 * 12
    assert float(found[4]) == int(found[2]) + 2 * int(found[3])
    assert KEY not in result.output
    # The same answer as a record.
    record = json.loads(run("generate", "the film", *at(server), *SEARCH, "--json").stdout)
    assert record["text"] == result.stdout.removesuffix("\n")
    assert record["token_ids"] == [] and record["usage"]["remote"]["requests"] == len(asked)


def test_a_file_is_answered_and_gone_on_with(server: Script, tmp_path: Path) -> None:
    asked = write_lines(
        tmp_path / "in.jsonl",
        [
            '{"prompt": "the film", "trace": true}',
            '{"prompt": [1, 2]}',
            '{"messages": [{"role": "user", "content": "hello"}], "method": "sample"}',
            '{"prompt": "a story", "method": "beam"}',
        ],
    )
    answers = tmp_path / "out.jsonl"
    options = ["--input", asked, "--output", answers, *at(server), *SEARCH]
    assert run("generate", *options).exit_code == 1
    whole = records(answers)
    assert "token ids" in whole[1]["error"]["message"]
    assert "method is 'beam'" in whole[3]["error"]["message"]
    assert whole[0]["trace"]["draws"] and whole[0]["trace"]["prompt"] == "the film"
    made_by = whole[0]["made_by"]
    assert made_by["base server"] == server.url and made_by["base model"] == "words"
    assert KEY not in answers.read_text()
    # A run that broke off goes on with what is missing.
    lines = answers.read_text().splitlines()
    answers.write_text("".join(f"{line}\n" for line in lines[:2]))
    server.begin()
    again = run("generate", *options, "--resume")
    assert again.exit_code == 1 and "2 lines are in" in again.stderr
    assert records(answers) == whole
    # Not by another model, though its texts may look alike.
    other = [*options, "--resume", "--extra-body", '{"repetition_penalty": 1.2}']
    refused = run("generate", *other)
    assert refused.exit_code == 2 and "base fields" in refused.output
    # What it recorded is searched again without the server.
    paths = demo_model_paths()
    again_here = Engine(
        base=RemoteBase.replay(answers),
        guides=Guide(str(paths.tuned), str(paths.untuned)),
        device="cpu",
    )
    params = SearchParams(beam_width=2, successors=2, chunk_length=4, max_new_tokens=12)
    assert again_here.generate("the film", params)[0].text == whole[0]["text"]
    # The page of its trees needs no tokenizer.
    page = run("trace", answers)
    assert page.exit_code == 0, page.output
    told = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert json.dumps(whole[0]["trace"]["rounds"][0]["candidates"][0]["text"]) in told


def test_a_budget_ends_a_search_and_says_so(server: Script) -> None:
    result = run("generate", "the film", *at(server), *SEARCH, "--max-requests", "2")
    assert result.exit_code == 0, result.output
    assert "ended early: max_requests (2) is used up" in result.stderr


def test_warnings_are_lines_for_people() -> None:
    with scripted(fields=frozenset(("model", "prompt", "n", "max_tokens", "temperature",
                                    "top_p"))) as server:  # fmt: skip
        result = run("generate", "the film", "--base-url", server.url, *SEARCH)
    assert result.exit_code == 0, result.output
    assert "warning: " in result.stderr and "top_k=50 has no effect there" in result.stderr
    assert "UserWarning" not in result.output and ".py:" not in result.output


def test_fields_of_ones_own_are_sent(server: Script) -> None:
    more = ["--extra-body", '{"repetition_penalty": 1.25}', "--base-route", "chat"]
    assert run("generate", "the film", *at(server), *SEARCH, *more).exit_code == 0
    assert all(each.body["repetition_penalty"] == 1.25 for each in server.asked)
    assert {each.route for each in server.asked} == {"chats"}
    assert set(MORE) <= {name for each in server.asked for name in each.body}


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--base-model", "words"], "without --base-url there is no use for --base-model"),
        (["--max-requests", "3"], "without --base-url there is no use for --max-requests"),
        (["--base-url", "http://127.0.0.1:9/v1", "--base", "gpt2"], "there is one base"),
        (["--base-url", "ftp://a"], "allowed: as http://host:8000/v1"),
        (["--base-url", "http://a/v1", "--api-key-env", "NO_SUCH_KEY"], "no key in NO_SUCH_KEY"),
        (["--base-url", "http://a/v1", "--tokenizer", "gpt2"], "of a base that runs here"),
        (["--base-url", "http://a/v1", "--extra-body", "{"], "is no JSON"),
        (["--base-url", "http://a/v1", "--price-per-million", "1"], "two numbers"),
        (["--base-url", "http://a/v1", "--method", "beam"], "allowed with a remote base: cbs"),
        (["--base-url", "http://127.0.0.1:9/v1", "--base-model", "m"], "check the url"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_reason(options: list[str], why: str) -> None:
    result = run("generate", "the film", *options)
    assert result.exit_code == 2, result.output
    assert why in " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.output).split())


def test_guides_of_ones_own_steer_it(server: Script) -> None:
    paths = demo_model_paths()
    named = ["--tuned", str(paths.untuned), "--untuned", str(paths.tuned)]
    result = run("generate", "the film", *at(server), *SEARCH, *named)
    assert result.exit_code == 0 and "bundled" not in result.output
