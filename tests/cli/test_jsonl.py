"""JSONL in and out: one bad line harms no other, and an output can always be gone on with."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from w2s_fast.cli.jsonl import (
    BadLine,
    Request,
    answer_record,
    bad_line_record,
    encode_record,
    read_requests,
)
from w2s_fast.cli.output_file import OutputFile
from w2s_fast.errors import InvalidRequest, NumericalError
from w2s_fast.params import SearchParams
from w2s_fast.result import Hypothesis, SearchResult, Usage

MODELS = {"base": "a"}
USAGE = Usage(prompt_tokens=3, completion_tokens=2, sampled_tokens=32, scored_tokens=32)


def read(*lines: str | bytes, defaults: SearchParams | None = None) -> list[Request | BadLine]:
    raw = [line.encode() if isinstance(line, str) else line for line in lines]
    return list(read_requests(raw, defaults or SearchParams(), MODELS))


def read_one(line: str | bytes, defaults: SearchParams | None = None) -> Request | BadLine:
    (request,) = read(line, defaults=defaults)
    return request


def record_of(request: Request | BadLine, text: str = "good") -> dict[str, Any]:
    if isinstance(request, BadLine):
        return bad_line_record(request)
    hypothesis = Hypothesis(text, [1, 2], 0.5, "eos", [0.25, 0.25], [-1.0, -1.0])
    return answer_record(request, SearchResult([hypothesis], USAGE))


@pytest.mark.parametrize(
    "prompt",
    ["The film", "", [1, 2, 3], [{"role": "user", "content": "Hello"}], "ünïcode 日本 \u2028"],
)
def test_a_prompt_is_text_or_ids_or_messages(prompt: Any) -> None:
    request = read_one(json.dumps({"prompt": prompt}))
    assert isinstance(request, Request)
    assert request.prompt == prompt


def test_a_line_may_set_any_parameter_and_the_others_stay() -> None:
    defaults = SearchParams(temperature=0.5, seed=3)
    line = (
        '{"prompt": "x", "id": [7], "beam_width": 2, "chunk_length": null, "stop_token_ids": [4]}'
    )
    request = read_one(line, defaults)
    assert isinstance(request, Request)
    assert request.id == [7]
    assert request.params == SearchParams(
        temperature=0.5, seed=3, beam_width=2, chunk_length=None, stop_token_ids=(4,)
    )


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("not json", "JSON"),
        ('{"prompt": "cut', "JSON"),
        (b'{"prompt": "\xff"}', "UTF-8"),
        (r'{"prompt": "\ud800"}', "UTF-8"),
        ("[" * 100_000, "JSON"),
        ('["x"]', "object"),
        ("{}", "no prompt"),
        ('{"prompt": 3}', "list of token ids"),
        ('{"prompt": []}', "not empty"),
        ('{"prompt": [1, "a"]}', "list of token ids"),
        ('{"prompt": [true]}', "list of token ids"),
        ('{"prompt": [{"role": "user"}]}', "chat messages"),
        ('{"prompt": "x", "temprature": 1}', "'temprature'"),
        ('{"prompt": "x", "temprature": 1}', "temperature"),
        ('{"prompt": "x", "top_p": 2}', "top_p is 2"),
        ('{"prompt": "x", "temperature": NaN}', "temperature is nan"),
        ('{"prompt": "x", "stop_token_ids": 5}', "stop_token_ids"),
    ],
)
def test_a_bad_line_says_what_is_wrong_and_harms_no_other(line: str | bytes, told: str) -> None:
    first, bad, last = read('{"prompt": "a"}', line, '{"prompt": "b"}')
    assert isinstance(first, Request)
    assert isinstance(last, Request)
    assert isinstance(bad, BadLine)
    assert bad.index == 1
    error = bad_line_record(bad)["error"]
    assert error["type"] == "InvalidRequest"
    assert told in error["message"]


def test_a_bad_line_keeps_its_id() -> None:
    assert record_of(read_one('{"prompt": 3, "id": "seven"}'))["id"] == "seven"


def test_blank_lines_are_skipped_but_counted() -> None:
    assert [r.index for r in read('{"prompt": "a"}', "", "  \n", '{"prompt": "b"}')] == [0, 3]


def test_lines_are_read_only_when_asked_for() -> None:
    def lines() -> Iterator[bytes]:
        yield b'{"prompt": "a"}'
        raise AssertionError("read too far")

    assert next(read_requests(lines(), SearchParams(), MODELS)).index == 0


def test_a_fingerprint_is_of_what_decides_the_answer() -> None:
    def of(line: str, seed: int = 0) -> str:
        return read_one(line, SearchParams(seed=seed)).fingerprint

    assert of('{"prompt": "a", "id": 1}') == of('{"id":1,"prompt":"a"}')
    assert of('{"prompt": "a", "seed": 5}') == of('{"prompt": "a"}', seed=5)
    others = {of('{"prompt": "a"}'), of('{"prompt": "b"}'), of('{"prompt": "a"}', seed=1)}
    others |= {of('{"prompt": "a", "id": 1}'), of("bad"), of("bad", seed=1)}
    (elsewhere,) = read_requests([b'{"prompt": "a"}'], SearchParams(), {"base": "b"})
    assert len(others | {elsewhere.fingerprint}) == 7


def test_a_failed_request_is_an_error_record() -> None:
    request = read_one('{"prompt": "a", "id": 1}')
    assert isinstance(request, Request)
    record = answer_record(request, SearchResult([], USAGE, error=NumericalError("NaN in base")))
    assert record["error"] == {"type": "NumericalError", "message": "NaN in base"}
    assert (record["index"], record["id"]) == (0, 1)


def test_several_hypotheses_are_written_when_several_were_asked_for() -> None:
    one, two = read('{"prompt": "a"}', '{"prompt": "a", "n": 2}')
    assert "hypotheses" not in record_of(one)
    assert record_of(two)["hypotheses"][0]["text"] == "good"


def test_a_record_is_one_line_whatever_is_in_it() -> None:
    line = encode_record({"index": 0, "text": "a\nb \u2028 ü \ud800"})
    assert line.count(b"\n") == 1
    assert json.loads(line)["text"] == "a\nb \u2028 ü \ud800"


INPUT = ['{"prompt": "a"}', "bad", '{"prompt": "b"}', '{"prompt": "c"}']


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """The output of a run over INPUT that was interrupted before the last line."""
    path = tmp_path / "out.jsonl"
    with OutputFile.create(path) as file:
        for request in read(*INPUT)[:3]:
            file.write(record_of(request))
    return path


def test_an_existing_output_is_never_overwritten(output: Path) -> None:
    with pytest.raises(InvalidRequest, match="--resume"):
        OutputFile.create(output)


def test_what_is_done_is_not_done_again(output: Path) -> None:
    with OutputFile.resume(output, read(*INPUT)) as file:
        assert file.done == {0, 1, 2}
        assert (file.failed_before, file.cut_bytes) == (1, 0)
        file.write(record_of(read(*INPUT)[3]))
    assert [json.loads(line)["index"] for line in output.open()] == [0, 1, 2, 3]


@pytest.mark.parametrize("left", [1, 5, 12, 60])
def test_a_half_written_last_line_is_cut_off(output: Path, left: int) -> None:
    whole = output.read_bytes()
    output.write_bytes(whole + encode_record(record_of(read(*INPUT)[3]))[:left])
    with OutputFile.resume(output, read(*INPUT)) as file:
        assert (file.done, file.cut_bytes) == ({0, 1, 2}, left)
    assert output.read_bytes() == whole


def test_errors_are_kept_unless_they_are_to_be_tried_again(output: Path) -> None:
    with output.open("ab") as file:
        file.write(b'{"index": 3, "te')
    with OutputFile.resume(output, read(*INPUT), retry_errors=True) as resumed:
        assert (resumed.done, resumed.failed_before, resumed.cut_bytes) == ({0, 2}, 0, 16)
        resumed.write(record_of(read(*INPUT)[3]))
    assert [json.loads(line)["index"] for line in output.open()] == [0, 2, 3]
    assert list(output.parent.iterdir()) == [output]


@pytest.mark.parametrize(
    "lines", [[*INPUT[:2], '{"prompt": "other"}'], INPUT[:2], [INPUT[1], INPUT[0]]]
)
def test_another_runs_output_is_refused_and_stays_as_it_is(output: Path, lines: list[str]) -> None:
    with output.open("ab") as file:
        file.write(b'{"index": 3, "te')
    before = output.read_bytes()
    with pytest.raises(InvalidRequest, match="cannot resume"):
        OutputFile.resume(output, read(*lines), retry_errors=True)
    assert output.read_bytes() == before


@pytest.mark.parametrize("text", [b"my notes", b"my notes\n", b"[1]\n", b'{"a": 1}\n'])
def test_a_file_of_something_else_is_refused_and_stays_as_it_is(
    tmp_path: Path, text: bytes
) -> None:
    path = tmp_path / "notes"
    path.write_bytes(text)
    with pytest.raises(InvalidRequest, match="no record"):
        OutputFile.resume(path, read(*INPUT))
    assert path.read_bytes() == text


def test_two_processes_do_not_write_one_output(output: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from w2s_fast.cli.output_file import OutputFile\n"
        "OutputFile.resume(Path(sys.argv[1]), [])"
    )
    with OutputFile.resume(output, read(*INPUT)):
        answer = subprocess.run(
            [sys.executable, "-c", script, str(output)], capture_output=True, text=True, check=False
        )
    assert "being written by another process" in answer.stderr
