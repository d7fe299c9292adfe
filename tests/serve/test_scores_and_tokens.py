"""/v1/score, /tokenize, /detokenize, /tokenizer_info, /v1/models."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest

from tests.support.foreign_guides import engine as foreign_engine
from tests.support.servers import Running, running
from w2s_fast import Chat


def test_items_are_scored_behind_the_query(server: Running, http: httpx2.Client) -> None:
    body = {"query": "ab", "items": ["cd", "xyz"]}
    found = http.post("/v1/score", json=body).json()
    expected = server.engine.token_scores(["ab"] * 2, ["cd", "xyz"])
    assert found["token_scores"] == [pytest.approx(own, abs=1e-6) for own in expected]
    assert found["scores"] == pytest.approx([sum(own) for own in expected], abs=1e-6)
    for of in ("base", "tuned", "untuned"):
        one = http.post("/v1/score", json={**body, "of": of}).json()
        expected = server.engine.token_scores(["ab"] * 2, ["cd", "xyz"], model=of)
        assert one["token_scores"] == [pytest.approx(own, abs=1e-6) for own in expected]
    ids = http.post("/v1/score", json={"query": [1, 2], "items": [[3, 4], [5]]}).json()
    assert [len(own) for own in ids["token_scores"]] == [2, 1]


def test_a_query_that_was_scored_is_not_read_again(server: Running, http: httpx2.Client) -> None:
    def hits() -> int:
        return server.engine.stats().pools["tuned"].cache_hit_tokens

    body = {"query": "a query of some length, as they are", "items": ["x"]}
    http.post("/v1/score", json=body)
    before = hits()
    http.post("/v1/score", json={**body, "items": ["y"]})
    assert hits() >= before + 16


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"label_token_ids": [1]}, "label tokens"),
        ({"apply_softmax": True}, "label tokens"),
        ({"of": "gpt-5"}, "allowed: base, tuned, untuned"),
        ({"items": []}, "items"),
        ({"items": [""]}, "empty"),
        ({"items": ["x"] * 129}, "129 items"),
        ({"items": "x"}, "items"),
        ({"query": None}, "query"),
        ({"model": "other"}, "not served"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    http: httpx2.Client, body: dict[str, Any], why: str
) -> None:
    answer = http.post("/v1/score", json={"query": "ab", "items": ["c"], **body})
    assert answer.status_code in (400, 404) and why in answer.json()["error"]["message"]


def test_texts_become_tokens_and_tokens_texts(server: Running, http: httpx2.Client) -> None:
    engine = server.engine

    def tokens(**body: Any) -> Any:
        answer = http.post("/tokenize", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    found = tokens(prompt="hé", return_token_strs=True)
    assert found["tokens"] == engine.encode("hé") and found["count"] == 4
    assert found["token_strs"][0] == "<bos>" and found["max_model_len"] == engine.max_tokens
    assert tokens(prompt="hé", add_special_tokens=False)["tokens"] == engine.encode("hé")[1:]
    messages = [{"role": "user", "content": "hi"}]
    assert tokens(messages=messages)["tokens"] == engine.encode(Chat(messages))
    back = http.post("/detokenize", json={"tokens": engine.encode("hé")}).json()
    assert back["prompt"] == "<bos>hé"
    for route, body in (
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "x", "messages": messages}),
        ("/detokenize", {"tokens": [9999]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": ["a"]}),
    ):
        answer = http.post(route, json=body)
        assert answer.status_code == 400 and answer.json()["error"]["message"]
    assert tokens(prompt="", add_special_tokens=False)["tokens"] == []


def test_what_the_tokenizer_is(server: Running, http: httpx2.Client) -> None:
    found = http.get("/tokenizer_info").json()
    assert found["bos_token"] == "<bos>" and found["eos_token"] == "<eos>"
    assert found["vocab_size"] == 258 and "role" in found["chat_template"]


def test_the_model_is_listed(http: httpx2.Client) -> None:
    (model,) = http.get("/v1/models").json()["data"]
    assert model["id"] == "tiny" and model["max_model_len"] == 128
    assert http.get("/v1/models/tiny").json() == model
    assert http.get("/v1/models/other").status_code == 404
    assert http.get("/v2/nothing").json()["error"]["message"] == "Not Found"
    assert http.get("/v1/completions").status_code == 405


def test_guides_that_read_other_tokens_give_sums_and_nothing_token_by_token() -> None:
    engine = foreign_engine("bytes-gpt2", "bpe-first", "wordpiece")
    with running(engine) as server, httpx2.Client(base_url=server.url, timeout=60) as http:
        body = {"query": "the film", "items": [" was a", " is"]}
        found = http.post("/v1/score", json=body).json()
        expected = engine.score(["the film"] * 2, [" was a", " is"])
        assert found["scores"] == pytest.approx(expected, abs=1e-9)
        assert found["token_scores"] is None
        one = http.post("/v1/score", json={**body, "of": "tuned 0"}).json()
        assert len(one["token_scores"]) == 2
