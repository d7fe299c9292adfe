"""/v1/completions: as the engine answers, in the shape that clients read."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import httpx2
import pytest

from tests.serve.conftest import DEFAULTS
from tests.support.servers import Running
from w2s_fast import SearchParams

AS_JSON = {"content-type": "application/json"}


def ask(http: httpx2.Client, **body: Any) -> dict[str, Any]:
    answer = http.post("/v1/completions", json={"seed": 5, **body})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def events(answer: httpx2.Response) -> list[Any]:
    lines = [line for line in answer.text.splitlines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def expected(server: Running, prompt: Any, **changes: Any) -> Any:
    (result,) = server.engine.generate([prompt], replace(DEFAULTS, seed=5, **changes))
    return result


def test_text_is_the_engine_s_own(server: Running, http: httpx2.Client) -> None:
    found = ask(http, prompt="ab")
    result = expected(server, "ab")
    (choice,) = found["choices"]
    assert choice["text"] == result.text and choice["index"] == 0
    assert choice["score"] == pytest.approx(result.score)
    assert choice["finish_reason"] == {"eos": "stop"}.get(
        result.finish_reason, result.finish_reason
    )
    assert found["object"] == "text_completion" and found["model"] == "tiny"
    assert found["usage"]["prompt_tokens"] == 3  # BOS, too
    assert found["usage"]["completion_tokens"] == len(result.token_ids)
    assert found["w2s"]["sampled_tokens"] == result.usage.sampled_tokens


def test_every_field_of_a_search_arrives(server: Running, http: httpx2.Client) -> None:
    changes: dict[str, Any] = {
        "method": "cbs",
        "beam_width": [3, 2],
        "successors": 3,
        "chunk_length": [5, 2],
        "temperature": 1.3,
        "top_k": 9,
        "top_p": 0.9,
        "min_p": 0.01,
        "stop_token_ids": [17],
        "ignore_eos": True,
        "n": 2,
        "finished": "replicate",
        "dedup": True,
        "score": "mean",
        "selection": "resample",
        "tau": 0.5,
        "trace": True,
    }
    found = ask(http, prompt="ab", max_tokens=9, min_tokens=2, **changes)
    result = expected(server, "ab", max_new_tokens=9, min_new_tokens=2, **changes)
    assert [c["text"] for c in found["choices"]] == [h.text for h in result.hypotheses]
    (trace,) = found["w2s"]["traces"]
    assert [r["kept"] for r in trace["rounds"]] == [r.kept for r in result.trace.rounds]


@pytest.mark.parametrize(
    ("body", "changes"),
    [
        ({"chunk_length": None}, {"chunk_length": None}),
        ({"temperature": None}, {}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"use_beam_search": True, "n": 3}, {"method": "beam", "beam_width": 3, "n": 3}),
        (
            {"use_beam_search": True, "best_of": 4, "n": 2, "temperature": 0},
            {"method": "beam", "beam_width": 4, "n": 2},
        ),
        ({"use_beam_search": False}, {}),
        ({"best_of": 1}, {}),
        ({"best_of": 5}, {"method": "bon", "successors": 5}),
        ({"best_of": 5, "n": 2}, {"method": "bon", "successors": 5, "n": 2}),
        ({"n": 3}, {"beam_width": 3, "n": 3}),
        ({"method": "sample", "n": 3}, {"method": "sample", "n": 3}),
        ({"max_completion_tokens": 4}, {"max_new_tokens": 4}),
        ({"frequency_penalty": 0, "user": "me", "logit_bias": None}, {}),
    ],
)
def test_what_others_call_a_search(
    server: Running, http: httpx2.Client, body: dict[str, Any], changes: dict[str, Any]
) -> None:
    found = ask(http, prompt="ab", **body)
    result = expected(server, "ab", **changes)
    assert [c["text"] for c in found["choices"]] == [h.text for h in result.hypotheses]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"num_beams": 4}, "beam_width, with method 'beam'"),
        ({"num_return_sequences": 2}, "allowed: n"),
        ({"frequency_penalty": 0.5}, "no counterpart"),
        ({"guided_regex": "a+"}, "no counterpart"),
        ({"prompt_logprobs": 1}, "echo with logprobs"),
        ({"beam_size": 4}, "no field"),
        ({"n": 0}, "n is 0; allowed"),
        ({"n": True}, "integer"),
        ({"n": "2"}, "integer"),
        ({"temperature": -1}, "temperature is -1"),
        ({"method": "magic"}, "method"),
        ({"max_tokens": 5000}, "max_tokens is 5000; allowed: 0 to 4096"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "differ"),
        ({"best_of": 2, "n": 3}, "at least n"),
        ({"best_of": 3, "method": "cbs"}, "no other method"),
        ({"use_beam_search": True, "method": "cbs"}, "one of them"),
        ({"stop": [""]}, "stop"),
        ({"beta": [1.0, 2.0], "method": "fusion"}, "beta has 2 numbers"),
        ({"stop_token_ids": [999]}, "stop_token_ids holds 999"),
        ({"prompt": []}, "0 prompts"),
        ({"prompt": [[]]}, ""),
        ({"prompt": ["a"] * 129}, "129 prompts"),
        ({"prompt": [300]}, "outside the vocabulary"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": "\ud800"}, "surrogate|Unicode|unicode"),
        ({"prompt": "a" * 200}, "allowed: 128 together"),
        ({"logprobs": 21}, "logprobs"),
        ({"stream": True, "echo": True}, "neither echo nor logprobs"),
        ({"beam_width": 10**12}, "candidates; allowed: 256"),
        ({"beam_width": 100, "successors": 3}, "300 candidates; allowed: 256"),
        ({"method": "sample", "n": 257}, "257 candidates"),
        ({"best_of": 300}, "300 candidates"),
        ({"use_beam_search": True, "n": 10**6}, "candidates"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**70}, "seed"),
        ({"temperature": 1e999}, "temperature"),
    ],
)
def test_what_cannot_be_is_a_400_that_says_why(
    http: httpx2.Client, body: dict[str, Any], why: str
) -> None:
    content = json.dumps({"prompt": "ab", **body})  # writes Infinity and half a character, too
    answer = http.post("/v1/completions", content=content.encode(), headers=AS_JSON)
    assert answer.status_code == (400 if why else 200), answer.text
    if why:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert re.search(why, error["message"]), error


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'"x"', b"\xff", b"[" * 100_000, b'{"prompt": NaN}']
)
def test_what_is_no_body_is_a_400(http: httpx2.Client, content: bytes) -> None:
    answer = http.post("/v1/completions", content=content, headers=AS_JSON)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_a_body_that_is_sent_as_a_form_is_told_how(http: httpx2.Client) -> None:
    for headers in ({}, {"content-type": "application/x-www-form-urlencoded"}):
        answer = http.post("/v1/completions", content=b'{"prompt": "ab"}', headers=headers)
        assert answer.status_code == 400
        assert "Content-Type: application/json" in answer.json()["error"]["message"]


def test_the_error_names_its_field(http: httpx2.Client) -> None:
    for body in ({"n": 0}, {"n": "x"}, {"max_tokens": -1}, {"temperature": -2}):
        answer = http.post("/v1/completions", json={"prompt": "ab", **body})
        assert answer.json()["error"]["param"] == next(iter(body))


def test_several_prompts_come_back_by_index(server: Running, http: httpx2.Client) -> None:
    found = ask(http, prompt=["ab", "xyz", "ab"], n=2)
    assert [c["index"] for c in found["choices"]] == list(range(6))
    texts = [h.text for p in ("ab", "xyz", "ab") for h in expected(server, p, n=2).hypotheses]
    assert [c["text"] for c in found["choices"]] == texts
    ids = server.engine.encode("ab")
    assert ask(http, prompt=[ids, ids])["choices"][1]["text"] == expected(server, ids).text


def test_without_a_seed_equal_prompts_differ_and_the_seed_is_told(
    server: Running, http: httpx2.Client
) -> None:
    body = {"prompt": ["ab"] * 3, "seed": None, "method": "sample", "max_tokens": 12}
    found = ask(http, **body)
    assert len({c["text"] for c in found["choices"]}) > 1
    seed = found["w2s"]["seed"]
    again = ask(http, prompt="ab", method="sample", max_tokens=12, seed=seed)
    assert again["choices"][0]["text"] == found["choices"][0]["text"]


def test_a_stream_is_the_answer_in_pieces_and_takes_nothing_back(http: httpx2.Client) -> None:
    for body in ({"prompt": "ab"}, {"prompt": ["ab", "xyz"], "n": 2}):
        whole = ask(http, **body)
        answer = http.post(
            "/v1/completions",
            json={"seed": 5, **body, "stream": True, "stream_options": {"include_usage": True}},
        )
        assert answer.headers["content-type"].startswith("text/event-stream")
        *pieces, last = events(answer)
        texts: dict[int, str] = {}
        reasons = {}
        for piece in pieces:
            (choice,) = piece["choices"]
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
            assert choice["index"] not in reasons
            if choice["finish_reason"]:
                reasons[choice["index"]] = choice["finish_reason"]
        assert texts == {c["index"]: c["text"] for c in whole["choices"]}
        assert reasons == {c["index"]: c["finish_reason"] for c in whole["choices"]}
        assert last["choices"] == [] and last["usage"] == whole["usage"] | {
            "prompt_tokens_details": last["usage"]["prompt_tokens_details"]
        }


def test_what_fails_before_a_stream_begins_has_a_status(http: httpx2.Client) -> None:
    answer = http.post("/v1/completions", json={"prompt": "a" * 200, "stream": True})
    assert answer.status_code == 400 and "allowed: 128" in answer.json()["error"]["message"]


def test_echo_with_logprobs_tells_of_every_token(server: Running, http: httpx2.Client) -> None:
    prompt = "abc"
    found = ask(http, prompt=prompt, echo=True, logprobs=2, max_tokens=4, method="sample")
    (choice,) = found["choices"]
    logprobs = choice["logprobs"]
    ids = server.engine.encode(prompt)
    result = expected(server, prompt, max_new_tokens=4, method="sample")
    (told,) = server.engine.log_probs([ids + result.token_ids], top=2)
    assert choice["text"] == prompt + result.text
    assert logprobs["token_logprobs"] == told.logprobs
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert {len(own) for own in logprobs.values()} == {len(told.token_ids)}
    for token, own, top in zip(
        logprobs["tokens"][1:], told.logprobs[1:], logprobs["top_logprobs"][1:]
    ):
        assert top[token] == own and 2 <= len(top) <= 3
        assert max(top.values()) >= own


def test_max_tokens_0_writes_nothing(server: Running, http: httpx2.Client) -> None:
    before = server.engine.stats().sampled_tokens
    found = ask(http, prompt=["abc", "de"], echo=True, logprobs=1, max_tokens=0)
    assert [c["text"] for c in found["choices"]] == ["abc", "de"]
    assert [len(c["logprobs"]["tokens"]) for c in found["choices"]] == [4, 3]
    assert found["usage"]["completion_tokens"] == 0
    assert server.engine.stats().sampled_tokens == before


def test_logprobs_without_echo_are_the_answer_s(server: Running, http: httpx2.Client) -> None:
    found = ask(http, prompt="abc", logprobs=0)
    result = expected(server, "abc")
    logprobs = found["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == pytest.approx(
        result.hypotheses[0].token_logprobs, abs=1e-5
    )
    assert logprobs["text_offset"][0] == 0


def test_the_likeliest_token_s_value_is_the_top_one_to_the_last_bit(http: httpx2.Client) -> None:
    found = ask(http, prompt="abc", echo=True, logprobs=1, max_tokens=20, temperature=0, n=1)
    logprobs = found["choices"][0]["logprobs"]
    greedy = list(zip(logprobs["token_logprobs"], logprobs["top_logprobs"]))[4:]
    assert all(own == max(top.values()) for own, top in greedy)


def test_another_model_is_not_found(http: httpx2.Client) -> None:
    answer = http.post("/v1/completions", json={"prompt": "ab", "model": "gpt-5"})
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"


def test_defaults_are_the_server_s_own(server: Running, http: httpx2.Client) -> None:
    assert SearchParams() != DEFAULTS
    assert ask(http, prompt="ab")["usage"]["completion_tokens"] <= DEFAULTS.max_new_tokens
