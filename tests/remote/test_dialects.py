"""What a server can do is found out once; then it is sent what it knows, and nothing else."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx2
import pytest
from starlette.responses import JSONResponse, Response

from tests.support.remote_engines import SAMPLE, SEARCH, remote, told
from tests.support.scripted_server import FIELDS, MORE, Asked, Script, error, scripted
from tests.support.servers import Running, running
from tests.support.tiny_models import byte_tokenizer, tiny_model
from w2s_fast import Chat, Engine, SearchParams
from w2s_fast.errors import InvalidRequest

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
TWO = SearchParams(
    beam_width=1, successors=2, chunk_length=2, max_new_tokens=6, top_k=0, seed=7, trace=True
)
SCORERS = [lambda candidates: [float(len(c.text)) for c in candidates]]


@pytest.fixture
def server() -> Iterator[Script]:
    with scripted() as found:
        yield found


def test_a_server_of_texts(server: Script) -> None:
    server.chats = False
    e = remote(server.url)
    assert e.server == f"{server.url} (model words): texts"
    assert [asked.route for asked in server.asked] == ["texts"]  # the other one is not there
    with pytest.raises(InvalidRequest, match="takes no chats: Not Found; give the prompt as a"):
        e.generate([MESSAGES], TWO)


def test_a_server_of_chats(server: Script) -> None:
    server.texts = False
    e = remote(server.url)
    assert e.server is not None
    assert e.server.endswith(": chats; chats go on by continue_final_message")
    server.begin()
    (result,) = e.generate(["hello"], TWO)
    first, *others = server.asked
    assert first.body == {
        "model": "words",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 2,
        "n": 2,
        "seed": 7,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
    }
    assert result.trace is not None
    behind = [draws[0].behind for draws in result.trace.draws]
    assert behind[0] == "" and len(others) == 2
    for asked, text in zip(others, behind[1:]):
        assert asked.body["messages"][1:] == [{"role": "assistant", "content": text}]
        assert asked.body["continue_final_message"] is True
        assert asked.body["add_generation_prompt"] is False
        assert asked.text == f"<user>hello\n<assistant>{text}"


def test_a_server_of_both_gets_each_by_its_route(server: Script) -> None:
    e = remote(server.url, (), scorers=SCORERS)
    for prompt, route, text in (
        ("hello", "texts", "hello"),
        (MESSAGES, "chats", "<system>Be brief.\n<user>hello\n<assistant>"),
    ):
        server.begin()
        e.generate([prompt], TWO)  # type: ignore[list-item]
        assert {asked.route for asked in server.asked} == {route}
        assert server.asked[0].text == text


@pytest.mark.parametrize("route", ["completions", "chat"])
def test_a_route_may_be_given(server: Script, route: Any) -> None:
    e = remote(server.url, route=route)
    assert {asked.route for asked in server.asked} == {"texts" if route[1] == "o" else "chats"}
    server.begin()
    e.generate(["hello"], TWO)
    assert {asked.route for asked in server.asked} == {"texts" if route[1] == "o" else "chats"}


def test_a_server_that_knows_prefix_and_answers_with_it(server: Script) -> None:
    """As Mistral's: further fields are refused, and the answer begins with what it goes on from."""
    server.texts, server.continuation, server.echoes = False, "prefix", True
    server.fields = FIELDS
    e = remote(server.url)
    assert e.server is not None
    assert e.server.endswith("chats; chats go on by prefix; it takes no min_p, seed, top_k")
    server.begin()
    (result,) = e.generate(["hello"], TWO)
    for asked in server.asked[1:]:
        *_, last = asked.body["messages"]
        assert last["role"] == "assistant" and last["prefix"] is True
    assert result.trace is not None
    for draws in result.trace.draws:
        for draw in draws:
            assert all(not s.text.startswith(draw.behind or "-") for s in draw.samples)
    with scripted(texts=False, fields=FIELDS, continuation="prefix") as silent:
        (expected,) = remote(silent.url).generate(["hello"], TWO)
    assert told(result) == told(expected)


def test_a_server_without_a_field_for_it_is_given_the_answer_so_far(server: Script) -> None:
    server.texts, server.continuation, server.fields = False, None, FIELDS | {"seed"}
    e = remote(server.url, continuation="plain")
    server.begin()
    e.generate(["hello"], TWO)
    for asked in server.asked[1:]:
        user, last = asked.body["messages"]
        assert user == {"role": "user", "content": "hello"}
        assert set(last) == {"role", "content"} and last["role"] == "assistant"


@pytest.mark.parametrize("way", ["continue_final_message", "prefix", "plain"])
def test_a_continuation_may_be_given(server: Script, way: Any) -> None:
    server.continuation = None if way == "plain" else way
    e = remote(server.url, route="chat", continuation=way)
    assert e.server is not None and f"go on by {way}" in e.server
    trial = server.asked[0]
    assert trial.max_tokens == 1 and trial.text.endswith("7319")


@pytest.mark.parametrize(
    ("known", "lost"),
    [(MORE, []), ({"seed"}, ["min_p", "top_k"]), (set(), ["min_p", "top_k"])],
    ids=["all", "seed", "none"],
)
def test_fields_that_a_server_refuses_are_not_sent(
    server: Script, known: set[str], lost: list[str]
) -> None:
    server.fields = FIELDS | frozenset(known)
    e = remote(server.url)
    server.begin()
    params = replace(SEARCH, top_k=5, min_p=0.01, top_p=0.9)
    with warnings.catch_warnings(record=True) as told_of:
        warnings.simplefilter("always")
        e.generate(["hello"], params)
    said = [str(w.message) for w in told_of if "has no effect there" in str(w.message)]
    assert len(said) == len(lost) and all(any(name in s for s in said) for name in lost)
    for asked in server.asked:
        assert asked.body["top_p"] == 0.9
        assert {"top_k", "min_p"}.isdisjoint(asked.body) == bool(lost)
        assert ("seed" in asked.body) == ("seed" in known)


def test_what_is_off_is_said_to_be(server: Script) -> None:
    """Servers may have other values of their own."""
    e = remote(server.url, ())
    server.begin()
    e.generate(["hello"], replace(SAMPLE, top_k=0, seed=3))
    assert server.asked[0].body == {
        "model": "words", "prompt": "hello", "max_tokens": 5, "seed": 3, "temperature": 0.7,
        "top_p": 1.0, "top_k": -1, "min_p": 0.0,
    }  # fmt: skip
    e.generate(["hello"], replace(SAMPLE, temperature=0.0))
    assert {"top_p", "top_k", "min_p"}.isdisjoint(server.asked[1].body)


def test_a_server_that_has_another_name_for_the_length(server: Script) -> None:
    def refuse(asked: Asked) -> Response | None:
        if "max_tokens" in asked.body:
            return error(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens'.")
        return None

    server.texts, server.instead = False, refuse
    e = remote(server.url)
    server.begin()
    e.generate(["hello"], TWO)
    assert all(asked.body["max_completion_tokens"] == 2 for asked in server.asked)


def test_a_model_that_only_chats_is_asked_so(server: Script) -> None:
    def refuse(asked: Asked) -> Response | None:
        if asked.route == "chats":
            return None
        return error(
            404, "This is a chat model and not supported in the v1/completions endpoint. Did you "
            "mean to use v1/chat/completions?",
        )  # fmt: skip

    server.instead = refuse
    e = remote(server.url)
    assert e.server is not None and ": chats;" in e.server


def test_a_model_without_a_chat_template_is_asked_for_texts(server: Script) -> None:
    def refuse(asked: Asked) -> Response | None:
        if asked.route == "texts":
            return None
        return error(400, "default chat template is no longer allowed: chat_template is not set")

    server.instead = refuse
    e = remote(server.url)
    assert e.server == f"{server.url} (model words): texts"


def test_texts_and_chats_each_have_their_own_word_for_the_length(server: Script) -> None:
    def refuse(asked: Asked) -> Response | None:
        wrong = "max_tokens" if asked.route == "chats" else "max_completion_tokens"
        return error(400, f"Unsupported parameter: {wrong}") if wrong in asked.body else None

    server.instead = refuse
    e = remote(server.url, ())
    server.begin()
    for result in e.generate(["hello", MESSAGES], SAMPLE):
        assert result.error is None
    assert {asked.route for asked in server.asked} == {"texts", "chats"}


def test_chats_are_sent_with_all_that_they_have(server: Script) -> None:
    e = remote(server.url, ())
    server.begin()
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    chat = Chat(MESSAGES, tools=[tool], chat_template_kwargs={"enable_thinking": False})
    e.generate([chat], SAMPLE)
    assert server.asked[0].body["messages"] == MESSAGES
    assert server.asked[0].body["tools"] == [tool]
    assert server.asked[0].body["chat_template_kwargs"] == {"enable_thinking": False}
    begun = [*MESSAGES, {"role": "assistant", "content": "Well, "}]
    server.begin()
    e = remote(server.url, (), scorers=SCORERS)
    server.begin()
    (result,) = e.generate([Chat(begun, continue_final_message=True)], TWO)
    assert result.trace is not None
    for asked, draws in zip(server.asked, result.trace.draws, strict=True):
        assert asked.body["messages"][2]["content"] == "Well, " + draws[0].behind
        assert asked.body["continue_final_message"] is True
    parts = [*MESSAGES, {"role": "assistant", "content": [{"type": "text", "text": "x"}]}]
    with pytest.raises(InvalidRequest, match="allowed: one with a text"):
        e.generate([Chat(parts, continue_final_message=True)], TWO)


def test_an_answer_may_come_in_parts(server: Script) -> None:
    def answer(asked: Asked) -> Response:
        parts = [{"type": "text", "text": "a "}, {"type": "other"}, {"type": "text", "text": "b"}]
        choice = {"finish_reason": "stop", "message": {"role": "assistant", "content": parts}}
        return JSONResponse({"choices": [choice], "usage": None})

    e = remote(server.url, (), route="chat")
    server.instead = answer
    assert e.generate(["hello"], SAMPLE)[0].text == "a b"


def test_further_fields_headers_and_a_template(server: Script) -> None:
    e = remote(
        server.url,
        (),
        extra_body={"chat_template_kwargs": {"a": 1}, "top_p": 0.5},
        headers={"X-Team": "blue"},
        api_key="sk-1234567890",
        template="Q: {prompt}\nA:",
    )
    for asked in server.asked:  # trials, too
        assert asked.body["chat_template_kwargs"] == {"a": 1}
    server.begin()
    (result,) = e.generate(["why"], SAMPLE)
    (asked,) = server.asked
    assert asked.text == "Q: why\nA:" and asked.body["top_p"] == 0.5
    assert asked.headers["x-team"] == "blue"
    assert asked.headers["authorization"] == "Bearer sk-1234567890"
    assert result.trace is not None and result.trace.prompt == "Q: why\nA:"


def test_nothing_of_another_service_is_sent(
    server: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID"):
        monkeypatch.setenv(f"OPENAI_{name}", "secret-of-another")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    custom = "Authorization: Bearer secret-of-another\nX-Key: secret-of-another"
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", custom)
    for key in (None, "own-key"):
        server.begin()
        remote(server.url, (), api_key=key).generate(["hello"], SAMPLE)
        assert server.asked
        for asked in server.asked:
            assert "secret-of-another" not in str(asked)
            assert asked.headers.get("authorization") == (f"Bearer {key}" if key else None)
            assert not [name for name in asked.headers if name.startswith("openai-")]


def test_the_only_model_need_not_be_named(server: Script) -> None:
    server.models = ["one/and-only"]
    e = remote(server.url, ())
    assert e.server is not None and "(model one/and-only)" in e.server
    server.begin()
    e.generate(["hello"], SAMPLE)
    assert server.asked[0].body["model"] == "one/and-only"


def test_this_projects_own_server_takes_chats_in_pieces(own_url: str) -> None:
    """Its model has no chat template, which it says."""
    e = remote(own_url)
    assert e.server is not None and e.server.endswith("(model own): texts")
    with pytest.raises(InvalidRequest, match=r"takes no chats: .*chat template"):
        e.generate([MESSAGES], TWO)


def test_a_chat_goes_on_in_this_projects_own_server(server_of_chats: Running) -> None:
    """What comes is what a plain request for it gives."""
    url = f"{server_of_chats.url}/v1"
    e = remote(url, (), route="chat", scorers=SCORERS)
    assert e.server is not None and "continue_final_message" in e.server
    (result,) = e.generate([MESSAGES], replace(SEARCH, top_k=0))
    assert result.trace is not None and len(result.trace.draws) > 2
    for draw in (draw for draws in result.trace.draws for draw in draws):
        body: dict[str, Any] = {"model": "chats", "messages": MESSAGES, "seed": draw.seed}
        if draw.behind:
            last = {"role": "assistant", "content": draw.behind}
            body |= {"messages": [*MESSAGES, last], "continue_final_message": True}
        body |= {"n": len(draw.samples), "max_tokens": draw.max_tokens, "temperature": 0.7}
        answer = httpx2.post(f"{url}/chat/completions", json={**body, "top_k": 0}).json()
        texts = [choice["message"]["content"] for choice in answer["choices"]]
        assert texts == [sample.text for sample in draw.samples]


@pytest.fixture(scope="module")
def server_of_chats() -> Iterator[Running]:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}"
        "{% if not loop.last %}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}\n[assistant] {% endif %}"
    )
    model = tiny_model(vocab_size=258, layers=1, eos=(257,), bos=256)
    e = Engine(model, tokenizer=tokenizer, kv_cache_tokens=4096, device="cpu")
    with running(e, name="chats") as found:
        yield found
