"""What is carried between processes, and who is asked; nothing of Ray runs here."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from pydantic import ValidationError
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError
from starlette.types import Message

from tests.serve.conftest import DEFAULTS, make_engine
from w2s_fast.serve import ServerSettings, build_app
from w2s_fast.serve.carried import Asked, Head, answered, beginning_of
from w2s_fast.serve.ray_app import Replica
from w2s_fast.serve.ray_config import RayConfig
from w2s_fast.serve.ray_front import Forwarder, merged
from w2s_fast.serve.ray_router import Beginnings

JSON = ((b"content-type", b"application/json"),)
EVENTS = ((b"content-type", b"text/event-stream; charset=utf-8"),)


async def asked_of(app: Any, asked: Asked) -> tuple[Head, list[bytes]]:
    head, *pieces = [piece async for piece in answered(app, asked)]
    assert isinstance(head, Head)
    return head, pieces  # type: ignore[return-value]


def test_an_application_answers_what_is_carried_to_it_as_it_answers_a_client() -> None:
    app = build_app(make_engine(), ServerSettings(name="tiny"), DEFAULTS)
    body = {"prompt": "ab", "seed": 5}

    async def ask() -> None:
        async with app.router.lifespan_context(app):
            whole = Asked("POST", "/v1/completions", b"", JSON, json.dumps(body).encode())
            head, pieces = await asked_of(app, whole)
            assert head.status == 200 and not head.streams
            text = json.loads(b"".join(pieces))["choices"][0]["text"]
            streamed = json.dumps({**body, "stream": True}).encode()
            head, pieces = await asked_of(
                app, Asked("POST", "/v1/completions", b"", JSON, streamed)
            )
            assert head.streams and len(pieces) > 2
            told = [json.loads(p[6:]) for p in pieces if not p.startswith(b"data: [DONE]")]
            assert "".join(one["choices"][0]["text"] for one in told) == text
            head, _ = await asked_of(app, Asked("GET", "/nowhere"))
            assert head.status == 404

    asyncio.run(ask())


def test_who_stops_listening_has_left() -> None:
    engine = make_engine()
    app = build_app(engine, ServerSettings(name="tiny"), DEFAULTS)

    async def leave() -> None:
        async with app.router.lifespan_context(app):
            body = {"prompt": "ab", "stream": True, "max_tokens": 500, "ignore_eos": True}
            asked = Asked("POST", "/v1/completions", b"", JSON, json.dumps(body).encode())
            pieces = answered(app, asked)
            assert isinstance(await anext(pieces), Head)
            await pieces.aclose()  # type: ignore[attr-defined]
            for _ in range(200):
                if not engine.stats().running:
                    break
                await asyncio.sleep(0.02)
            assert engine.stats().running == 0 and app.state.service.gate.under_way == 0

    asyncio.run(leave())


def test_a_replica_whose_engine_has_failed_ends_and_says_nothing() -> None:
    app = build_app(make_engine(), ServerSettings(name="tiny"), DEFAULTS)

    class Ended(Exception):
        """In the place of the process's end."""

    class Own(Replica):
        def __init__(self) -> None:
            self._app = app

        def _end(self, why: str) -> None:
            raise Ended(why)

        def __del__(self) -> None:  # type: ignore[override]
            """Nothing was begun."""

    async def ask() -> None:
        async with app.router.lifespan_context(app):
            asked = Asked("POST", "/v1/completions", b"", JSON, b'{"prompt": "ab"}')
            (head, *_) = [piece async for piece in Own().answer(asked)]
            assert isinstance(head, Head) and head.status == 200
            await app.state.service.engine.close()
            with pytest.raises(Ended, match="has failed"):
                await anext(Own().answer(asked))
            app.state.service.gate.draining = True  # then it has only been closed
            (head, *_) = [piece async for piece in Own().answer(asked)]
            assert isinstance(head, Head) and head.status == 503

    asyncio.run(ask())


def test_what_an_application_did_not_say_is_an_error() -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        asyncio.run(asked_of(broken, Asked("GET", "/")))


@pytest.mark.parametrize(
    ("body", "beginning"),
    [
        ({"prompt": "a text"}, "a text"),
        ({"prompt": ["first", "second"]}, "first"),
        ({"prompt": [1, 2, 3]}, "[1, 2, 3]"),
        ({"prompt": [[1, 2], [3]]}, "[1, 2]"),
        ({"query": "scored"}, "scored"),
        ({"prompt": []}, "[]"),
        ({"model": "x"}, ""),
        ([1], ""),
    ],
)
def test_a_body_begins_with_its_prompt(body: Any, beginning: str) -> None:
    assert beginning_of(json.dumps(body).encode()) == beginning


def test_conversations_begin_with_what_they_share() -> None:
    first = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a"}]
    longer = [*first, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    one, two = (beginning_of(json.dumps({"messages": m}).encode()) for m in (first, longer))
    assert two.startswith(one[:-2])
    assert beginning_of(b"no json") == beginning_of(b"[" * 10_000) == ""


# --- who was sent what


def test_the_longest_common_beginning_says_who_is_asked() -> None:
    found = Beginnings(block=4, most=100)
    found.sent("aaaabbbb", "one")
    found.sent("aaaacccc", "two")
    assert next(found.longest("aaaabbbbxxxx")) == "one"
    assert next(found.longest("aaaaccccxxxx")) == "two"
    assert next(found.longest("aaaadddd")) == "two"  # the last one that had it
    assert list(found.longest("xaaaabbbb")) == []
    assert list(found.longest("")) == list(found.longest("aaa")) == []


def test_a_short_text_is_known_again_and_old_ones_are_forgotten() -> None:
    found = Beginnings(block=4, most=3)
    found.sent("ab", "one")
    assert list(found.longest("ab")) == ["one"] and list(found.longest("abc")) == []
    found.sent("aaaabbbbcccc", "two")
    assert list(found.longest("ab")) == []
    assert list(found.longest("aaaabbbbcccc")) == ["two"] * 3


# --- a replica that dies


class Replicas:
    """In the place of Serve's handle: each call is answered by the next of these."""

    def __init__(self, *answers: Callable[[Asked], AsyncIterator[Any]]) -> None:
        self._answers = list(answers)
        self.calls: list[Asked] = []

    def options(self, **_: Any) -> Replicas:
        return self

    def remote(self, asked: Asked) -> Any:
        self.calls.append(asked)
        return Told(self._answers[len(self.calls) - 1](asked))


class Told:
    def __init__(self, pieces: AsyncIterator[Any]) -> None:
        self._pieces = pieces

    def __aiter__(self) -> Told:
        return self

    async def __anext__(self) -> Any:
        return await anext(self._pieces)

    def cancel(self) -> None: ...


def tells(*pieces: Any) -> Callable[[Asked], AsyncIterator[Any]]:
    async def told(asked: Asked) -> AsyncIterator[Any]:
        for piece in pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    return told


def forwarded(replicas: Replicas, seconds: float = 10.0) -> tuple[int, bytes]:
    """Status and body of what a client gets."""
    sent: list[Message] = []

    async def ask() -> None:
        async def receive() -> Message:
            return {"type": "http.request", "body": b'{"prompt": "ab"}', "more_body": False}

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        await Forwarder(replicas, seconds)(scope, receive, send)  # type: ignore[arg-type]

    asyncio.run(ask())
    assert [message["type"] for message in sent].count("http.response.start") == 1
    assert [message.get("more_body", False) for message in sent[1:]].count(False) == 1
    return sent[0]["status"], b"".join(message["body"] for message in sent[1:])


WHOLE, STREAM = Head(200, JSON), Head(200, EVENTS)


@pytest.mark.parametrize(
    "before", [(), (WHOLE,), (WHOLE, b"half"), (STREAM,)], ids=["nothing", "head", "half", "stream"]
)
def test_a_request_is_asked_again_as_long_as_the_client_has_heard_nothing(before: Any) -> None:
    replicas = Replicas(tells(*before, ActorDiedError()), tells(WHOLE, b"an ", b"answer"))
    assert forwarded(replicas) == (200, b"an answer")
    assert len(replicas.calls) == 2 and replicas.calls[0] == replicas.calls[1]
    assert replicas.calls[0].beginning == "ab"


def test_a_stream_that_breaks_off_ends_with_an_error_and_is_not_begun_again() -> None:
    replicas = Replicas(tells(STREAM, b"data: a\n\n", b"data: b\n\n", ActorDiedError()))
    status, body = forwarded(replicas)
    assert status == 200 and body.startswith(b"data: a\n\ndata: b\n\n")
    assert json.loads(body.split(b"data: ")[-1])["error"]["code"] == "replica_lost"
    assert len(replicas.calls) == 1


def test_a_request_that_kills_whoever_answers_it_kills_three() -> None:
    replicas = Replicas(*[tells(ActorDiedError())] * 9)
    status, body = forwarded(replicas)
    assert status == 503 and b"3 replicas were lost" in body and len(replicas.calls) == 3


def test_what_waits_too_long_or_behind_too_many_is_told_so() -> None:
    async def slow(asked: Asked) -> AsyncIterator[Any]:
        await asyncio.sleep(60)
        yield WHOLE

    assert forwarded(Replicas(slow), seconds=0.05)[0] == 504
    full = BackPressureError(num_queued_requests=5, max_queued_requests=5)
    status, body = forwarded(Replicas(tells(full)))
    assert status == 429 and json.loads(body)["error"]["code"] == "queue_full"


def test_metrics_of_replicas_stand_side_by_side() -> None:
    head = "# HELP w2s:steps_total Steps.\n# TYPE w2s:steps_total counter\n"
    told = head + 'w2s:steps_total{m="x"} %d.0\n'
    text = merged({"a": told % 1, "b": told % 2}).decode()
    assert text.count("# HELP") == 1
    assert 'w2s:steps_total{m="x",replica="a"} 1.0' in text
    assert 'w2s:steps_total{m="x",replica="b"} 2.0' in text


# --- what an application is started with


def test_options_are_those_of_the_command() -> None:
    from w2s_fast.cli.serve import serve

    code = serve.__code__
    options = set(code.co_varnames[: code.co_argcount]) - {"config", "host", "port"}
    assert options <= set(RayConfig.model_fields)


def test_a_replica_is_given_what_its_rows_take_and_a_quarter_more() -> None:
    config = RayConfig.model_validate(
        {"max-rows": 64, "search": {"beam_width": 2, "successors": 4}, "api-key": "secret"}
    )
    assert (config.places, config.most_ongoing) == (8, 10)
    assert config.settings.name == "bundled" and len(config.settings.api_keys) == 1
    remote = {"base-url": "http://h/v1", "base-model": "big", "price-per-million": "1,2"}
    priced = RayConfig.model_validate(remote)
    assert priced.price_per_million == (1.0, 2.0) and priced.settings.name == "big"
    assert RayConfig(device="cpu").gpus == 0 and RayConfig().gpus == 1


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"host": "0.0.0.0"}, "host"),
        ({"base": "x", "tuned": ["y"]}, "each tuned needs its untuned"),
        ({"tuned": "x", "untuned": "y"}, "name it"),
        ({"weight": [1, 2]}, "2 weights for 1 guides"),
        ({"search": {"beam_width": 0}}, "beam_width is 0"),
        ({"search": {"beams": 1}}, "beams"),
        ({"base": "x", "search": {"method": "cbs"}}, "steering needs"),
        ({"max_replicas": 3}, "go together"),
        ({"base": "x", "base_url": "http://h/v1"}, "there is one base"),
        ({"base_model": "x"}, "go with base_url"),
    ],
)
def test_what_does_not_fit_is_refused_where_it_is_written(given: Any, told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        RayConfig.model_validate(given)
