"""JSONL in and out: one bad line harms no other, and an output can always be gone on with."""

from __future__ import annotations

import io
import json
import math
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from w2s_fast import Chat
from w2s_fast.cli.jsonl import (
    BadLine,
    Request,
    answer_record,
    bad_line_record,
    encode_record,
    read_requests,
)
from w2s_fast.cli.lines import MAX_LINE_BYTES, LongLine, read_lines
from w2s_fast.errors import NumericalError
from w2s_fast.params import SearchParams
from w2s_fast.result import Hypothesis, SearchResult, Usage

MODELS = {"base weights": "a", "dtype": "float32", "torch": "2.13.0"}
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


def test_a_chat_may_have_tools_and_variables_of_its_template_beside_it() -> None:
    line: dict[str, Any] = {"prompt": [{"role": "user", "content": "Hi"}], "seed": 3}
    options: dict[str, Any] = {
        "tools": [{"name": "f"}],
        "chat_template_kwargs": {"deep": False},
        "continue_final_message": True,
    }
    plain, chat = read(json.dumps(line), json.dumps({**line, **options}))
    assert isinstance(plain, Request) and isinstance(chat, Request)
    assert plain.for_engine == line["prompt"] and plain.params == chat.params
    assert chat.for_engine == Chat(line["prompt"], **options)
    assert plain.fingerprint != chat.fingerprint
    bad = read_one('{"prompt": "Hi", "tools": []}')
    assert isinstance(bad, BadLine) and "'tools' beside a prompt that is no list" in str(bad.error)


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
def test_a_line_may_ask_for_beams(early_stopping: Any) -> None:
    asked = {"method": "beam", "length_penalty": 0.5, "early_stopping": early_stopping}
    request = read_one(json.dumps({"prompt": "x", **asked}))
    assert isinstance(request, Request)
    assert request.params == SearchParams(**asked)


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
        '{"prompt": "x", "id": [7], "beam_width": 2, "chunk_length": null, "stop_token_ids": [4], '
        '"chunk_stop": ["\\n", ". "]}'
    )
    request = read_one(line, defaults)
    assert isinstance(request, Request)
    assert request.id == [7]
    assert request.params == SearchParams(
        temperature=0.5,
        seed=3,
        beam_width=2,
        chunk_length=None,
        stop_token_ids=(4,),
        chunk_stop=("\n", ". "),
    )


def test_a_line_may_set_widths_by_round() -> None:
    line = '{"prompt": "x", "beam_width": [8, 4, 2], "successors": 1, "chunk_length": [4, null]}'
    request, again = (read_one(line) for _ in range(2))
    assert isinstance(request, Request)
    assert request.params == SearchParams(
        beam_width=(8, 4, 2), successors=1, chunk_length=(4, None)
    )
    assert request.fingerprint == again.fingerprint


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
        ('{"prompt": "x", "temperature": NaN}', "NaN is no JSON"),
        ('{"prompt": "x", "id": [{"a": -Infinity}]}', "-Infinity is no JSON"),
        ('{"prompt": "x", "temperature": 1e999}', "1e999 is too large"),
        ('{"prompt": "x", "id": ' + "9" * 5000 + "}", "JSON"),
        ('{"prompt": "x", "temperature": ' + "9" * 4000 + "}", "temperature is 999"),
        ('{"prompt": "x", "seed": ' + "9" * 4000 + "}", "seed is 999"),
        ('{"prompt": "x", "seed": 1, "seed": 2}', "'seed' comes twice"),
        ('{"prompt": "x", "id": {"a": 1, "a": 1}}', "'a' comes twice"),
        ('{"prompt": "x", "id": ' + "[" * 1000 + "]" * 1000 + "}", "JSON"),
        ('{"prompt": "x", "id": ' + "[" * 100 + "]" * 100 + "}", "100 levels"),
        ('{"prompt": "x", "id": {"\\ud800": 1}}', "UTF-8"),
        ('{"prompt": "x", "\\udfff": 1}', "UTF-8"),
        ('{"prompt": "x\0"}', "JSON"),
        ("\0" * 9, "JSON"),
        ('{"prompt": "x"}'.encode("utf-16"), "UTF-8"),
        ('{"prompt": "x", "stop_token_ids": 5}', "stop_token_ids"),
        ('{"prompt": "x", "chunk_stop": [""]}', "chunk_stop"),
        ('{"prompt": "x", "selection": {}}', "selection is {}"),
        ('{"prompt": "x", "beam_width": []}', "beam_width is []"),
        ('{"prompt": "x", "beam_width": [4, null]}', "beam_width is None"),
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
    assert len(encode_record(bad_line_record(bad))) < 1500  # it does not echo the line


def test_a_bad_line_keeps_its_id() -> None:
    assert record_of(read_one('{"prompt": 3, "id": "seven"}'))["id"] == "seven"


def test_blank_lines_are_skipped_but_counted() -> None:
    assert [r.index for r in read('{"prompt": "a"}', "", "  \n", '{"prompt": "b"}')] == [0, 3]


def test_an_id_may_be_nested_deep_and_comes_back_as_it_was() -> None:
    deep = json.dumps({"prompt": "x", "id": json.loads("[" * 99 + "]" * 99)})
    record = record_of(read_one(deep))
    assert "error" not in record
    assert json.loads(encode_record(record))["id"] == json.loads(deep)["id"]


def test_lines_may_end_as_windows_ends_them_and_the_last_one_not_at_all() -> None:
    first, second = read('{"prompt": "a"}\r\n', '{"prompt": "a"}')
    assert isinstance(first, Request)
    assert first.prompt == "a"
    assert first.fingerprint == second.fingerprint


def test_a_number_that_is_not_finite_is_written_as_null() -> None:
    record = {"index": 0, "score": math.nan, "trace": [{"score": -math.inf, "kept": (1, 2.5)}]}
    expected = {"index": 0, "score": None, "trace": [{"score": None, "kept": [1, 2.5]}]}
    assert json.loads(encode_record(record)) == expected


# --- the lines of a file


def lines_of(data: bytes, limit: int = 10) -> list[bytes | LongLine]:
    return list(read_lines(io.BytesIO(data), limit))


def test_lines_come_with_their_ends_and_without_the_mark_at_the_beginning() -> None:
    assert lines_of(b"") == []
    assert lines_of(b"a\r\n\nb") == [b"a\r\n", b"\n", b"b"]
    assert lines_of(b"\xef\xbb\xbfa\n\xef\xbb\xbfb\n") == [b"a\n", b"\xef\xbb\xbfb\n"]


@pytest.mark.parametrize("end", [b"\n", b"\nnext\n", b""])
def test_a_line_that_is_too_long_is_passed_over(end: bytes) -> None:
    assert lines_of(b"a" * 10 + end) == [b"a" * 10 + end[:1], *([b"next\n"] * (len(end) > 1))]
    for length in (11, 20, 21, 22, 50):
        long, *rest = lines_of(b"a" * length + end)
        assert isinstance(long, LongLine)
        assert long.length == length + len(end[:1])
        assert rest == [b"next\n"] * (len(end) > 1)
    one, other = (lines_of(b"a" * 25 + last + end)[0] for last in (b"x", b"y"))
    assert one != other


def test_a_line_of_many_megabytes_takes_little_memory_and_harms_no_other(
    tmp_path: Path,
) -> None:
    path = tmp_path / "in.jsonl"
    with path.open("wb") as file:
        file.write(b'{"prompt": "a"}\n')
        file.truncate(30_000_000)  # zeros, of which the file system keeps none
        file.seek(0, io.SEEK_END)
        file.write(b'\n{"prompt": "b"}\n')
    tracemalloc.start()
    with path.open("rb") as file:
        first, bad, last = read_requests(read_lines(file, 1 << 18), SearchParams(), MODELS)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert isinstance(first, Request)
    assert isinstance(last, Request)
    assert (first.prompt, last.prompt, last.index) == ("a", "b", 2)
    assert isinstance(bad, BadLine)
    assert f"allowed: {MAX_LINE_BYTES} at most" in str(bad.error)
    assert peak < 2 << 20


def test_a_prompt_of_a_million_token_ids_is_no_long_line() -> None:
    assert len(json.dumps({"prompt": [151_643]})) * 1_000_000 / 2 < MAX_LINE_BYTES


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
    (elsewhere,) = read_requests([b'{"prompt": "a"}'], SearchParams(), {"base weights": "b"})
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
