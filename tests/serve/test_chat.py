"""/v1/chat/completions: messages through the template, answered as the engine answers them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import httpx2
import pytest

from tests.serve.conftest import DEFAULTS, make_engine
from tests.serve.test_completions import events
from tests.support.servers import Running, running
from w2s_fast import Chat

MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
]


def ask(http: httpx2.Client, **body: Any) -> dict[str, Any]:
    answer = http.post("/v1/chat/completions", json={"seed": 5, "messages": MESSAGES, **body})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_messages_are_answered_as_the_engine_does(server: Running, http: httpx2.Client) -> None:
    found = ask(http, n=2)
    (result,) = server.engine.generate([Chat(MESSAGES)], replace(DEFAULTS, seed=5, n=2))
    assert found["object"] == "chat.completion"
    for i, (choice, hypothesis) in enumerate(zip(found["choices"], result.hypotheses, strict=True)):
        assert choice["index"] == i and choice["message"]["role"] == "assistant"
        assert choice["message"]["content"] == hypothesis.text
    assert found["usage"]["prompt_tokens"] == len(server.engine.encode(Chat(MESSAGES)))


def test_the_last_message_can_be_continued(server: Running, http: httpx2.Client) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "well"}]
    found = ask(http, messages=messages, continue_final_message=True, add_generation_prompt=False)
    chat = Chat(messages, continue_final_message=True)
    (result,) = server.engine.generate([chat], replace(DEFAULTS, seed=5))
    assert found["choices"][0]["message"]["content"] == result.text


def test_a_stream_is_the_same_answer(http: httpx2.Client) -> None:
    whole = ask(http, n=2)
    answer = http.post(
        "/v1/chat/completions",
        json={
            "seed": 5,
            "messages": MESSAGES,
            "n": 2,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    )
    *pieces, last = events(answer)
    texts: dict[int, str] = {}
    for piece in pieces:
        assert piece["object"] == "chat.completion.chunk"
        (choice,) = piece["choices"]
        first = choice["index"] not in texts
        assert choice["delta"].get("role") == ("assistant" if first else None)
        text = choice["delta"].get("content", "")
        texts[choice["index"]] = texts.get(choice["index"], "") + text
    assert texts == {c["index"]: c["message"]["content"] for c in whole["choices"]}
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


def test_logprobs_are_those_of_the_answer_s_tokens(server: Running, http: httpx2.Client) -> None:
    found = ask(http, logprobs=True, top_logprobs=2)
    (result,) = server.engine.generate([Chat(MESSAGES)], replace(DEFAULTS, seed=5))
    content = found["choices"][0]["logprobs"]["content"]
    own = [entry["logprob"] for entry in content]
    assert own == pytest.approx(result.hypotheses[0].token_logprobs, abs=1e-5)
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    assert all(entry["top_logprobs"][0]["logprob"] >= entry["logprob"] for entry in content)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "x"}]}, "role"),
        ({"messages": [{"role": "user"}]}, "chat message"),
        ({"tools": [{"type": "function"}]}, "no counterpart"),
        ({"stream": True, "logprobs": True}, "no logprobs"),
        ({"top_logprobs": 2}, "needs logprobs"),
        ({"add_generation_prompt": False}, "continue_final_message"),
        ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs"),
        ({"prompt": "x"}, "no field"),
    ],
)
def test_what_cannot_be_is_a_400(http: httpx2.Client, body: dict[str, Any], why: str) -> None:
    answer = http.post("/v1/chat/completions", json={"messages": MESSAGES, **body})
    assert answer.status_code == 400, answer.text
    assert why in answer.json()["error"]["message"]


def test_a_base_without_a_template_is_said_to_have_none() -> None:
    engine = make_engine()
    assert engine.tokenizer is not None
    engine.tokenizer.chat_template = None
    with running(engine) as server, httpx2.Client(base_url=server.url) as http:
        for stream in (False, True):
            body = {"messages": MESSAGES, "stream": stream}
            answer = http.post("/v1/chat/completions", json=body)
            assert answer.status_code == 400
            assert "no chat template" in answer.json()["error"]["message"]
