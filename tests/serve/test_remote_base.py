"""A server whose base is another one's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from tests.support.remote_engines import remote
from tests.support.scripted_server import scripted
from tests.support.servers import running
from w2s_fast import SearchParams

DEFAULTS = SearchParams(beam_width=2, successors=2, chunk_length=4, max_new_tokens=12)


@pytest.fixture(scope="module")
def http() -> Iterator[httpx2.Client]:
    with (
        scripted() as theirs,
        running(remote(theirs.url), DEFAULTS) as own,
        httpx2.Client(base_url=own.url, timeout=60) as client,
    ):
        yield client


def test_texts_are_steered_whole_and_as_streams(http: httpx2.Client) -> None:
    body = {"prompt": "the film was", "seed": 3, "max_tokens": 12, "trace": True}
    whole = http.post("/v1/completions", json=body).json()
    (choice,) = whole["choices"]
    assert choice["score"] is not None and whole["usage"]["completion_tokens"] <= 12
    (trace,) = whole["w2s"]["traces"]
    assert any(c["text"] == choice["text"] for c in trace["rounds"][-1]["candidates"])
    pieces = ""
    with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as told:
        for line in told.iter_lines():
            if line.startswith("data: {"):
                pieces += json.loads(line[6:])["choices"][0]["text"]
    assert pieces == choice["text"]


def test_the_page_shows_its_rounds(http: httpx2.Client) -> None:
    events: list[dict[str, Any]] = []
    body = {"prompt": "the film was", "seed": 3, "max_tokens": 12}
    with http.stream("POST", "/live", json=body) as told:
        events += [json.loads(line[6:]) for line in told.iter_lines() if line[:6] == "data: "]
    first, *_, done = events
    assert first["prompt"] == "the film was"
    rounds = [each for each in events if each["type"] == "round"]
    assert rounds and any(c["text"] for c in rounds[0]["candidates"])
    assert done["text"] and done["usage"]["remote"]["requests"] >= len(rounds)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a", "logprobs": 1}),
        ("/v1/completions", {"prompt": [1, 2]}),
        ("/v1/completions", {"prompt": "a", "method": "fusion"}),
        ("/tokenize", {"prompt": "a"}),
        ("/detokenize", {"tokens": [1]}),
    ],
)
def test_what_needs_the_bases_tokens_is_refused(
    http: httpx2.Client, path: str, body: dict[str, Any]
) -> None:
    answer = http.post(path, json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


def test_models_and_guides_are_told_as_ever(http: httpx2.Client) -> None:
    (model,) = http.get("/v1/models").json()["data"]
    assert "max_model_len" not in model
    assert http.get("/tokenizer_info").status_code == 400
    scored = http.post("/v1/score", json={"query": "the film", "items": [" was good"]})
    assert scored.status_code == 200, scored.text
