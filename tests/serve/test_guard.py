"""Limits, keys, clients that leave, an engine that fails, and the end of a server."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest

from tests.serve.conftest import DEFAULTS, make_engine
from tests.support.broken_models import broken_copy, failing
from tests.support.engines import assert_all_pages_free
from tests.support.servers import Running, running
from tests.support.tiny_models import byte_tokenizer, tiny_model
from w2s_fast import Engine, Guide

AS_JSON = {"content-type": "application/json"}
BODY = {"prompt": "ab", "seed": 5, "max_tokens": 60, "ignore_eos": True}


def until(condition: Callable[[], bool]) -> None:
    """It comes true soon, or the test fails."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@contextmanager
def client(server: Running, **headers: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=server.url, timeout=60, headers=headers) as found:
        yield found


def error_of(answer: httpx2.Response) -> dict[str, Any]:
    found: dict[str, Any] = answer.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return found


def test_a_key_opens_what_is_not_open_to_all() -> None:
    with running(make_engine(), api_keys=("one", "two")) as server:
        for headers in ({}, {"authorization": "Bearer three"}, {"authorization": "one"}):
            with client(server, **headers) as http:
                for route in ("/v1/completions", "/v1/score", "/tokenize"):
                    answer = http.post(route, json=BODY)
                    assert answer.status_code == 401
                    assert error_of(answer)["code"] == "invalid_api_key"
                assert http.get("/v1/models").status_code == 401
                for route in ("/health", "/ready", "/metrics"):
                    assert http.get(route).status_code == 200
        for key in ("one", "two"):
            with client(server, authorization=f"Bearer {key}") as http:
                assert http.get("/v1/models").status_code == 200
        assert "one" not in repr(server.service.settings)


def test_a_body_has_a_size(server: Running) -> None:
    with running(make_engine(), body_bytes=2000) as small, client(small) as http:
        answer = http.post("/v1/completions", json={"prompt": "a" * 3000})
        assert answer.status_code == 413 and error_of(answer)["code"] == "body_too_large"

        def pieces() -> Iterator[bytes]:  # no content-length goes with it
            yield b'{"prompt": "'
            for _ in range(30):
                yield b"a" * 100
            yield b'"}'

        answer = http.post("/v1/completions", content=pieces(), headers=AS_JSON)
        assert answer.status_code == 413
        assert http.post("/v1/completions", json={"prompt": "ab"}).status_code == 200


def test_who_finds_the_queue_full_is_told_when_to_come_again() -> None:
    engine = make_engine()
    with running(engine, DEFAULTS, queue=2) as server, client(server) as http:
        with ThreadPoolExecutor() as pool:
            with engine.runner.turn():  # nobody takes a step
                both = [pool.submit(http.post, "/v1/completions", json=BODY) for _ in range(2)]
                until(lambda: server.service.gate.under_way == 2)
                answer = http.post("/v1/completions", json=BODY)
                stream = http.post("/v1/completions", json={**BODY, "stream": True})
            assert [one.result().status_code for one in both] == [200, 200]
        assert answer.status_code == stream.status_code == 429
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert error_of(answer)["code"] == "queue_full"
        # A body of more prompts than the queue is long comes in when there is nobody else.
        assert http.post("/v1/completions", json={**BODY, "prompt": ["a"] * 3}).status_code == 200
        assert server.service.gate.under_way == 0


def test_a_request_has_its_time_and_is_then_given_up() -> None:
    engine = make_engine()
    with running(engine, DEFAULTS, seconds=0.3) as server, client(server) as http:
        with engine.runner.turn():
            answer = http.post("/v1/completions", json=BODY)
            stream = http.post("/v1/completions", json={**BODY, "stream": True})
        assert answer.status_code == stream.status_code == 504
        assert error_of(answer)["code"] == error_of(stream)["code"] == "timeout"
        until(lambda: engine.stats().running + engine.stats().waiting == 0)
        assert_all_pages_free_soon(engine)


def assert_all_pages_free_soon(engine: Engine) -> None:
    until(lambda: not any(p.used_pages for p in engine.stats().pools.values()))
    with engine.runner.turn():
        assert_all_pages_free(engine)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_a_client_that_leaves_is_given_up(stream: bool, route: str) -> None:
    engine = make_engine()
    with running(engine, DEFAULTS) as server:
        body: dict[str, Any] = {**BODY, "stream": stream}
        if route != "completions":
            del body["prompt"]
            body["messages"] = [{"role": "user", "content": "ab"}]
        content = json.dumps(body).encode()
        parts = urlsplit(server.url)
        address = (parts.hostname, parts.port)
        with closing(socket.create_connection(address)) as connection, engine.runner.turn():
            connection.sendall(
                b"POST /v1/%s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (route.encode(), len(content), content)
            )
            until(lambda: engine.stats().waiting == 1)
            connection.close()
            until(lambda: server.service.gate.under_way == 0)
        until(lambda: engine.stats().aborted == 1)
        assert_all_pages_free_soon(engine)
        assert engine.stats().steps == 0


def test_a_slow_reader_holds_nobody_up_and_gets_everything(server: Running) -> None:
    parts = urlsplit(server.url)
    content = json.dumps({**BODY, "stream": True}).encode()
    with closing(socket.create_connection((parts.hostname, parts.port))) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
            % (len(content), content)
        )
        with client(server) as http:
            whole = http.post("/v1/completions", json=BODY).json()["choices"][0]["text"]
        received = b""
        while piece := connection.recv(64):
            received += piece
            time.sleep(0.001)
    _, _, stream = received.partition(b"\r\n\r\n")
    texts = [
        json.loads(line.removeprefix(b"data: "))["choices"][0]["text"]
        for line in stream.splitlines()
        if line.startswith(b"data: {")
    ]
    assert "".join(texts) == whole


def test_nan_of_a_guide_is_an_error_of_its_own_request() -> None:
    base, untuned = (
        tiny_model(family, vocab_size=258, layers=1, eos=(257,), bos=256)
        for family in ("llama", "gpt2")
    )
    tokenizer = byte_tokenizer()
    (bad,) = tokenizer("~")["input_ids"][1:]
    model = tiny_model("llama", seed=7, vocab_size=258, layers=1, eos=(257,), bos=256)
    guide = Guide(broken_copy(model, bad, float("nan")), untuned)
    engine = Engine(base, guide, tokenizer=tokenizer, device="cpu", kv_cache_tokens=2048)
    with running(engine, DEFAULTS) as server, client(server) as http:
        with ThreadPoolExecutor() as pool:
            prompts = ["ab", "a~b", "xyz"]
            found = list(
                pool.map(
                    lambda p: http.post(
                        "/v1/completions", json={"prompt": p, "seed": 5, "max_tokens": 6}
                    ),
                    prompts,
                )
            )
        assert [one.status_code for one in found] == [200, 500, 200]
        assert "tuned" in error_of(found[1])["message"]
        assert error_of(found[1])["type"] == "server_error"
        assert http.get("/ready").status_code == 200


def test_an_engine_whose_thread_is_gone_is_not_ready() -> None:
    engine = make_engine()
    with running(engine, DEFAULTS) as server, client(server) as http:
        with ThreadPoolExecutor() as pool, failing(engine.base.model, 2, SystemExit()):
            both = [
                pool.submit(http.post, "/v1/completions", json={**BODY, "stream": stream})
                for stream in (False, True)
            ]
            answers = [one.result() for one in both]
        for answer in answers:
            told = answer.text if answer.status_code == 200 else json.dumps(error_of(answer))
            assert answer.status_code == 503 or "engine_unavailable" in told, answer.text
        until(lambda: http.get("/ready").status_code == 503)
        assert http.get("/health").status_code == 200
        again = http.post("/v1/completions", json=BODY)
        assert again.status_code == 503 and error_of(again)["code"] == "engine_unavailable"


def test_a_fault_of_the_server_s_own_is_shaped_like_all_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with running(make_engine(), DEFAULTS) as server, client(server) as http:

        def fail(_: object) -> None:
            raise ValueError("boom")

        monkeypatch.setattr(server.service, "check_model", fail)
        with logged() as lines:
            answer = http.post("/v1/completions", json=BODY)
            until(lambda: len(lines) == 1)
        assert answer.status_code == lines[0]["status"] == 500
        assert error_of(answer)["code"] == "internal_error" and "boom" not in answer.text


def test_a_server_that_stops_lets_those_within_end_and_nobody_in() -> None:
    engine = make_engine()
    with running(engine, DEFAULTS) as server, client(server) as http:
        with ThreadPoolExecutor() as pool:
            with engine.runner.turn():
                within = pool.submit(http.post, "/v1/completions", json=BODY)
                until(lambda: server.service.gate.under_way == 1)
                drained = asyncio.run_coroutine_threadsafe(
                    server.service.gate.drain(30), server.loop
                )
                until(lambda: server.service.gate.draining)
                answer = http.post("/v1/completions", json=BODY)
                ready = http.get("/ready")
                assert not drained.done()
            assert within.result().status_code == 200
            assert drained.result(30)
        assert answer.status_code == ready.status_code == 503
        assert error_of(answer)["code"] == "stopping" and answer.headers["retry-after"]


@contextmanager
def logged() -> Iterator[list[dict[str, Any]]]:
    lines: list[dict[str, Any]] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(vars(record))  # type: ignore[method-assign]
    log = logging.getLogger("w2s_fast.serve")
    log.addHandler(handler)
    level = log.level
    log.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def test_every_answer_has_an_id_and_lines_without_text(
    server: Running, http: httpx2.Client
) -> None:
    with logged() as lines:
        own = http.post("/v1/completions", json=BODY, headers={"x-request-id": "mine-1"})
        other = http.post("/v1/completions", json={**BODY, "n": 0})
        until(lambda: len(lines) == 3)
    assert own.headers["x-request-id"] == "mine-1" and other.headers["x-request-id"]
    answer, first, second = lines
    assert (answer["msg"], first["msg"], second["msg"]) == ("answer", "request", "request")
    assert answer["request_id"] == first["request_id"] == "mine-1"
    assert first["path"] == "/v1/completions" and [first["status"], second["status"]] == [200, 400]
    assert answer["completion_tokens"] == own.json()["usage"]["completion_tokens"]
    assert not any(own.json()["choices"][0]["text"] in str(line) for line in lines)


def test_texts_are_in_the_log_where_that_was_asked_for() -> None:
    with running(make_engine(), DEFAULTS, log_text=True) as server, client(server) as http:
        for body in ({"prompt": "ab"}, {"prompt": "ab", "stream": True}):
            with logged() as lines:
                http.post("/v1/completions", json={**body, "seed": 5})
                until(lambda: len(lines) == 2)
            assert lines[0]["prompt"] == "ab" and lines[0]["texts"][0]


def test_what_is_counted(server: Running, http: httpx2.Client) -> None:
    def read() -> dict[str, float]:
        lines = http.get("/metrics").text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    label = '{model_name="tiny"}'
    before = read()
    found = http.post("/v1/completions", json=BODY).json()
    http.post("/v1/completions", json={**BODY, "stream": True})
    after = read()

    def grew(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    usage = found["usage"]
    assert grew(f"w2s:prompt_tokens_total{label}") == 2 * usage["prompt_tokens"]
    assert grew(f"w2s:generation_tokens_total{label}") == 2 * usage["completion_tokens"]
    assert grew('w2s:request_success_total{finished_reason="length",model_name="tiny"}') == 2
    assert grew(f"w2s:e2e_request_latency_seconds_count{label}") == 2
    assert grew(f"w2s:time_to_first_token_seconds_count{label}") == 1
    assert grew(f"w2s:rounds_total{label}") == 2 * found["w2s"]["rounds"]
    candidates = (
        grew(f"w2s:candidates_kept_total{label}"),
        grew(f"w2s:candidates_pruned_total{label}"),
    )
    assert sum(candidates) == 2 * 4 * found["w2s"]["rounds"]  # W=K=2
    assert candidates[0] == candidates[1]
    for name in ("num_requests_running", "num_requests_waiting"):
        assert after[f"w2s:{name}{label}"] == 0
    assert 0 <= after['w2s:kv_cache_usage_perc{model="base",model_name="tiny"}'] <= 1
