"""A server of OpenAI's kind that behaves as a script says, over real sockets; it writes down what
it was asked.

Its model draws words by the text before them, the seed and the number of the choice: asked again,
it answers the same. Some of its tokens are parts of characters.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from tests.support.servers import listening

TOKENS = [
    *(b" the", b" film", b" was", b" a", b" story", b"s", b"ing", b".", b"\n", b" ", b" hello"),
    *("\u4eca".encode(), "\u5929".encode()[:2], "\u5929".encode()[2:], "\U0001f600".encode()[:3]),
    *("\U0001f600".encode()[3:], "\u00e9".encode()),
]
FIELDS = frozenset(("model", "temperature", "top_p", "n", "max_tokens", "prompt", "messages"))
MORE = frozenset(("top_k", "min_p", "seed", "continue_final_message", "add_generation_prompt"))


class Choice(NamedTuple):
    """An answer's text, its reason, and its tokens."""

    text: str | None
    reason: str | None = "length"
    tokens: int = 0


@dataclass
class Asked:
    """A body, and the text that the model goes on with."""

    route: str
    body: dict[str, Any]
    headers: dict[str, str]
    text: str
    port: int
    at: float = field(default_factory=time.perf_counter)

    @property
    def samples(self) -> int:
        return int(self.body.get("n", 1))

    @property
    def max_tokens(self) -> int:
        return int(self.body.get("max_tokens") or self.body["max_completion_tokens"])


def drawn(asked: Asked, index: int, ends: float = 0.05) -> Choice:
    """As many tokens as there may be, unless one ends the text before."""
    greedy = asked.body.get("temperature") == 0
    key = asked.text if greedy else f"{asked.text}|{asked.body.get('seed')}|{index}"
    drawing, found = random.Random(key), list[bytes]()
    for _ in range(asked.max_tokens):
        if drawing.random() < ends:
            return Choice(_decoded(found), "stop", len(found) + 1)
        found.append(drawing.choice(TOKENS))
    return Choice(_decoded(found), "length", len(found))


def never_ending(asked: Asked, index: int) -> Choice:
    return drawn(asked, index, 0)


def _decoded(tokens: Sequence[bytes]) -> str:
    return b"".join(tokens).decode("utf-8", "replace")


@dataclass
class Script:
    """What the server is like.

    Attributes:
        models: that it lists and knows. key: that it wants.
        texts, chats: its routes. fields: of a body, that it takes; None: any.
        continuation: the field by which a chat goes on with its last message; None: it does so
            whenever that is the assistant's.
        echoes: whether it then answers with that message before what is new.
        most: choices in an answer. extra: further ones, that nobody asked for.
        usage: whether it counts tokens. context: tokens together.
        choice: what comes. instead: another answer than that, or an error; None: what comes.
        delay: seconds before it answers.
        asked: all that was. left: how many did not wait for their answers. at_once: most of them.
    """

    models: Sequence[str] = ("words",)
    key: str | None = None
    texts: bool = True
    chats: bool = True
    fields: frozenset[str] | None = None
    continuation: str | None = "continue_final_message"
    echoes: bool = False
    most: int | None = None
    extra: int = 0
    usage: bool = True
    context: int | None = None
    choice: Callable[[Asked, int], Choice] = drawn
    instead: Callable[[Asked], Response | None] | None = None
    delay: float = 0.0
    asked: list[Asked] = field(default_factory=list)
    left: int = 0
    at_once: int = 0
    url: str = ""
    _here: int = 0

    @property
    def samples(self) -> int:
        """That were asked for, all together."""
        return sum(asked.samples for asked in self.asked)

    def begin(self) -> None:
        """Forget what was asked before."""
        self.asked.clear()
        self.left = self.at_once = 0


def error(status: int, message: str, code: str | None = None, **headers: str) -> JSONResponse:
    """As OpenAI's API has it."""
    own = {key.replace("_", "-"): value for key, value in headers.items()}
    body = {"error": {"message": message, "type": "error", "param": None, "code": code}}
    return JSONResponse(body, status, headers=own)


@contextmanager
def scripted(**script: Any) -> Iterator[Script]:
    """A server that listens; its script may be changed while it does."""
    own = Script(**script)
    with listening(_app(own)) as (url, _):
        own.url = f"{url}/v1"
        yield own


def _app(script: Script) -> FastAPI:
    app = FastAPI()

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        if (wrong := _wrong_key(script, request)) is not None:
            return wrong
        return JSONResponse({"object": "list", "data": [{"id": name} for name in script.models]})

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        if not script.texts:
            return JSONResponse({"detail": "Not Found"}, 404)
        body = await request.json()
        asked = Asked("texts", body, dict(request.headers), body["prompt"], _port(request))
        return await _answer(script, request, asked)

    @app.post("/v1/chat/completions")
    async def chats(request: Request) -> Response:
        if not script.chats:
            return JSONResponse({"detail": "Not Found"}, 404)
        body = await request.json()
        text, _ = _written(script, body)
        asked = Asked("chats", body, dict(request.headers), text, _port(request))
        return await _answer(script, request, asked)

    return app


def _port(request: Request) -> int:
    return 0 if request.client is None else request.client.port


def _wrong_key(script: Script, request: Request) -> Response | None:
    given = request.headers.get("authorization")
    if script.key is None or given == f"Bearer {script.key}":
        return None
    return error(401, f"wrong key: {given}", "invalid_api_key")


def _written(script: Script, body: dict[str, Any]) -> tuple[str, str]:
    """The messages, and the last one where the answer goes on with it."""
    *before, last = body["messages"]
    text = "".join(f"<{m['role']}>{m['content']}\n" for m in before)
    begun = f"<{last['role']}>{last['content']}"
    how = script.continuation
    told = last["role"] == "assistant" if how is None else body.get(how) or last.get(how)
    if told:
        return text + begun, str(last["content"])
    return f"{text}{begun}\n<assistant>", ""


async def _answer(script: Script, request: Request, asked: Asked) -> Response:
    script._here += 1
    script.at_once = max(script.at_once, script._here)
    script.asked.append(asked)
    try:
        until = time.perf_counter() + script.delay
        while time.perf_counter() < until:
            if await request.is_disconnected():
                script.left += 1
                return Response(status_code=499)
            await asyncio.sleep(0.002)
        return _wrong_key(script, request) or _refused(script, asked) or _said(script, asked)
    finally:
        script._here -= 1


def _refused(script: Script, asked: Asked) -> Response | None:
    body = asked.body
    if script.instead is not None and (found := script.instead(asked)) is not None:
        return found
    if body["model"] not in script.models:
        return error(404, f"The model `{body['model']}` does not exist.", "model_not_found")
    if script.fields is not None and (unknown := sorted(set(body) - script.fields)):
        where = [
            {"loc": ["body", name], "msg": "Extra inputs are not permitted"} for name in unknown
        ]
        return JSONResponse({"detail": where}, 422)
    length = _length(asked.text) + asked.max_tokens
    if script.context is not None and length > script.context:
        return error(
            400, f"This model's maximum context length is {script.context} tokens. However, you "
            f"requested {length} tokens.", "context_length_exceeded",
        )  # fmt: skip
    return None


def _length(text: str) -> int:
    return -(-len(text.encode()) // 3)


def _said(script: Script, asked: Asked) -> Response:
    count = min(asked.samples, script.most or 10_000) + script.extra
    found = [script.choice(asked, i) for i in range(count)]
    choices: list[dict[str, Any]] = []
    for i, choice in enumerate(found):
        own: dict[str, Any] = {"index": i, "finish_reason": choice.reason}
        text = choice.text
        if asked.route == "texts":
            choices.append({**own, "text": text})
            continue
        if script.echoes and text is not None:
            text = _written(script, asked.body)[1] + text
        choices.append({**own, "message": {"role": "assistant", "content": text}})
    answer: dict[str, Any] = {"id": "x", "object": "x", "created": 0, "model": asked.body["model"]}
    answer["choices"] = choices
    if script.usage:
        read, sampled = _length(asked.text), sum(choice.tokens for choice in found)
        answer["usage"] = {"prompt_tokens": read, "completion_tokens": sampled,
                           "total_tokens": read + sampled}  # fmt: skip
    return JSONResponse(answer)
