"""Errors name the server, what it was asked and what to change; a key is in none of them."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import pytest
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

from tests.support.remote_engines import SAMPLE, SEARCH, remote
from tests.support.scripted_server import Asked, Script, error, never_ending, scripted
from w2s_fast import Engine, RemoteBase
from w2s_fast.errors import InvalidRequest, RemoteFailure, UnsupportedModel
from w2s_fast.remote.failures import Answered

KEY = "sk-very-secret-0123456789"


@pytest.fixture
def server() -> Iterator[Script]:
    with scripted() as found:
        yield found


def refused(url: str, **options: Any) -> str:
    with pytest.raises(RemoteFailure) as caught:
        remote(url, (), **options)
    assert str(caught.value).startswith(url)
    return str(caught.value)


def test_nobody_is_there(short_pauses: None) -> None:
    said = refused("http://127.0.0.1:1/v1", model="m", max_retries=0)
    assert re.search(
        r"\(model m\): a token by /completions: no connection: .*; check the url, and that it runs",
        said,
    )
    assert "its models: no connection" in refused("http://127.0.0.1:1/v1", max_retries=0)


def test_a_server_without_these_routes(server: Script) -> None:
    server.texts = server.chats = False
    said = refused(server.url)
    assert "a token by /completions: 404: Not Found; check the url (it ends with /v1" in said
    assert "/completions: 404" in refused(server.url.removesuffix("/v1"), model="words")
    server.chats = True
    assert "another route" in refused(server.url, route="completions")


@pytest.mark.parametrize("model", [None, "words"])
def test_a_wrong_key(server: Script, model: str | None) -> None:
    server.key = "right"
    for key in (None, "wrong-key-123"):
        said = refused(server.url, model=model, api_key=key)
        assert "401: wrong key: " in said and "give the key that it wants as api_key" in said
        assert key is None or key not in said
        assert "Bearer ..." in said or key is None
    remote(server.url, (), model=model, api_key="right")


def test_an_unknown_model(server: Script) -> None:
    server.models = ["words", "others"]
    said = refused(server.url, model="word")
    assert "404: The model `word` does not exist. (model_not_found); name a model that it" in said
    assert said.endswith("it lists: words, others")


def test_several_models_and_none_named(server: Script) -> None:
    server.models = ["words", "others"]
    assert refused(server.url).endswith("no model was named; give model, one of: words, others")
    server.models = []
    assert refused(server.url).endswith("give model, one of: it lists none")


def test_a_page_is_no_answer(server: Script, short_pauses: None) -> None:
    server.instead = lambda asked: HTMLResponse("<html>Welcome to nginx!</html>")
    assert "a token by /completions" in refused(server.url, max_retries=0)
    server.instead = None
    e = remote(server.url, (), max_retries=1)
    for answer in (
        HTMLResponse("<html>Welcome</html>"),
        JSONResponse({"error": {"message": "overloaded"}}),
        JSONResponse({"choices": []}),
        JSONResponse({"choices": "none"}),
        JSONResponse([1]),
        JSONResponse({"choices": [{"text": 3}]}),
        PlainTextResponse(""),
    ):
        server.begin()
        server.instead = lambda asked, answer=answer: answer  # type: ignore[misc]
        with pytest.raises(
            RemoteFailure, match=r"answers without any, 2 times( \(overloaded\))?; check that it is"
        ):
            e.generate(["hello"], replace(SAMPLE, n=2))
        assert len(server.asked) <= 3


def test_a_busy_server(server: Script, short_pauses: None) -> None:
    e = remote(server.url, (), max_retries=1)
    server.instead = lambda asked: error(429, "slow down")
    with pytest.raises(RemoteFailure, match="429: slow down; give a smaller max_concurrency") as c:
        e.generate(["hello"], SAMPLE)
    assert "1 samples of 5 tokens by /completions" in str(c.value)
    server.instead = lambda asked: PlainTextResponse("oops", 500)
    with pytest.raises(RemoteFailure, match=r"500: .*; its own log says why"):
        e.generate(["hello"], SAMPLE)


FULL = [
    (400, "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens "
     "(4990 in the messages, 10 in the completion)."),
    (400, "'max_tokens' or 'max_completion_tokens' is too large: 50. This model's maximum context "
     "length is 32 tokens and your request has 30 input tokens"),
    (400, "the request exceeds the available context size (4096 tokens), try increasing it"),
    (400, "Input length (40) exceeds model's maximum context length (32)."),
    (422, "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 2048: context "
     "length exceeded"),
    (400, "prompt and max_new_tokens are 130 tokens together; allowed: 128 together"),
]  # fmt: skip


@pytest.mark.parametrize(("status", "message"), FULL)
def test_where_the_context_is_full_the_search_ends_with_what_it_has(
    server: Script, status: int, message: str
) -> None:
    server.choice = never_ending
    e = remote(server.url)
    server.instead = lambda asked: error(status, message) if len(asked.text) > 20 else None
    (result,) = e.generate(["hello"], SEARCH)
    assert result.ended_early == "the context of the model is full"
    assert result.error is None and result.finish_reason == "length" and result.text
    assert not e.runner.stats().running
    with pytest.raises(InvalidRequest, match="nothing was sampled: the context of the model is f"):
        e.generate(["hello, this is too long"], SEARCH)


def test_only_those_texts_end_for_which_there_is_no_room(server: Script) -> None:
    server.choice = never_ending
    e = remote(server.url)
    server.begin()
    server.context = 22
    (result,) = e.generate(["hello"], replace(SEARCH, max_new_tokens=24, n=3))
    assert result.ended_early and result.trace is not None
    full = [draw.ended is not None for draws in result.trace.draws for draw in draws]
    assert any(full) and not all(full[-3:])


def test_this_projects_own_server_says_that_it_is_full(own_url: str) -> None:
    """Its model has 128 positions."""
    e = remote(own_url)
    params = replace(SEARCH, beam_width=1, chunk_length=30, max_new_tokens=200, stop=(), seed=1)
    (result,) = e.generate(["hello"], params)
    if result.finish_reason != "eos":
        assert result.ended_early == "the context of the model is full"
    assert result.error is None


def test_what_is_no_server_is_named() -> None:
    for url in ("localhost:8000", "ftp://x/v1", "", 7, None, "http://"):
        with pytest.raises(InvalidRequest, match=r"allowed: as http://host:8000/v1"):
            RemoteBase(url)  # type: ignore[arg-type]
    for url in (f"http://me:{KEY}@x/v1", f"ftp://{KEY}@x", f"http://x/v1?key={KEY}"):
        with pytest.raises(InvalidRequest, match="api_key") as caught:
            RemoteBase(url)
        assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"api_key": KEY + "\n"}, {"api_key": f" {KEY}"}, {"api_key": KEY + "\x00"},
        {"api_key": KEY + "\u00e9"}, {"api_key": ""}, {"api_key": 7},
        {"headers": {"X-Key": KEY + "\n"}}, {"headers": {"X-Key\n": KEY}}, {"headers": [KEY]},
        {"headers": {"X-Key": 7}},
    ],
    ids=repr,
)  # fmt: skip
def test_what_cannot_be_sent_is_refused_before_and_not_shown(options: Any) -> None:
    with pytest.raises(InvalidRequest, match="allowed: ") as caught:
        RemoteBase("http://x/v1", **options)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"route": "texts"}, "route is 'texts'; allowed: 'auto', 'completions', 'chat'"),
        ({"continuation": "x"}, "continuation is 'x'; allowed: 'auto', 'continue_final_message'"),
        ({"extra_body": {"n": 3}}, "extra_body holds 'n', which a search sets itself"),
        ({"extra_body": {"stream": True}}, "extra_body holds 'stream'"),
        ({"extra_body": {"x": object()}}, "extra_body is no JSON"),
        ({"extra_body": [1]}, "extra_body is no JSON"),
    ],
)
def test_other_arguments_are_checked(options: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(message)):
        RemoteBase("http://x/v1", **options)


def test_without_the_openai_package_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("w2s_fast.remote.")]:
        if name.rpartition(".")[2] in ("client", "failures", "trial", "sending"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UnsupportedModel, match=r"pip install 'w2s-fast\[remote\]'"):
        Engine(base=RemoteBase("http://127.0.0.1:1/v1"), device="cpu")


def telling(asked: Asked) -> Response:
    """Answers that repeat all that they were sent."""
    return error(418, f"you said {asked.headers} and {asked.headers['authorization']}")


@contextlib.contextmanager
def heard() -> Iterator[io.StringIO]:
    """All that anybody logs."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    root = logging.getLogger()
    names = [None, *(n for n in logging.root.manager.loggerDict if not n.startswith("torch"))]
    levels = {name: logging.getLogger(name).level for name in names}
    root.addHandler(handler)
    for name in names:
        logging.getLogger(name).setLevel(logging.DEBUG)
    try:
        yield stream
    finally:
        root.removeHandler(handler)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def shown(error: Exception) -> Iterator[str]:
    """Its traceback with all that stands in its frames, but for the test's own."""
    assert error.__traceback__ is not None
    return traceback.TracebackException(
        type(error), error, error.__traceback__.tb_next, capture_locals=True
    ).format()


def test_a_key_is_nowhere(server: Script, short_pauses: None) -> None:
    server.key = KEY
    header = "another-secret-42"
    texts: list[str] = []
    with heard() as logged:
        base = RemoteBase(
            server.url, api_key=KEY, headers={"X-Key": f"Token {header}"}, max_retries=1
        )
        e = Engine(base=base, device="cpu")
        (result,) = e.generate(["hello"], SAMPLE)
        texts += [repr(base), str(base), repr(e.server), repr(result), str(asdict(result))]
        assert server.asked[-1].headers["x-key"] == f"Token {header}"
        for instead in (telling, lambda asked: error(500, str(asked.headers)), None):
            server.instead = instead
            if instead is None:
                server.key = "another"
            with pytest.raises(RemoteFailure) as caught:
                e.generate(["hello"], SAMPLE)
            texts += [repr(caught.value), *shown(caught.value)]
            texts += traceback.format_exception(caught.value)
            texts += [repr(own) for own in caught.value.results or ()]
        with pytest.raises(RemoteFailure) as caught:
            Engine(base=base, device="cpu")
        texts += shown(caught.value)
    log = logged.getvalue()
    assert "/completions" in log and len(log) > 1000  # somebody was heard
    for text in [log, *texts]:
        assert KEY not in text and header not in text
    assert any("..." in text for text in texts)


def test_a_redirection_to_somebody_else_takes_no_key_along(server: Script) -> None:
    with scripted() as other:
        e = remote(server.url, (), api_key=KEY)
        server.instead = lambda asked: Response(
            status_code=307, headers={"location": f"{other.url}/completions"}
        )
        e.generate(["hello"], SAMPLE)
        (asked,) = other.asked
        assert asked.text == "hello" and KEY not in str(asked)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"error": {"message": "a", "code": "b"}}, "a (b)"),
        ({"error": "plain"}, "plain"),
        ({"detail": [{"loc": ["n"]}]}, "[{'loc': ['n']}]"),
        ({"message": "m" * 600}, "m" * 500 + "..."),
    ],
    ids=str,
)
def test_what_servers_say_is_found(server: Script, body: Any, said: str) -> None:
    e = remote(server.url, ())
    server.instead = lambda asked: JSONResponse(body, 418)
    with pytest.raises(RemoteFailure, match=re.escape(f"418: {said}; ")):
        e.generate(["hello"], SAMPLE)


def test_an_error_of_our_own_is_told_as_one() -> None:
    said = str(Answered(TypeError(f"bad {KEY}"), [KEY]).failure("here", "something"))
    assert said.startswith("here: something: TypeError: bad ...")
