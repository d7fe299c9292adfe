"""Requests that one process takes in and another one answers: what is carried between the two."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Scope

Headers = tuple[tuple[bytes, bytes], ...]

STREAM = b"text/event-stream"


@dataclass(frozen=True)
class Asked:
    """A request of HTTP, whole.

    Attributes:
        path: behind the prefix that the application has. query: as it was sent.
        beginning: text that is shared by requests whose pages are, from its first character on;
            "" where there is none.
    """

    method: str
    path: str
    query: bytes = b""
    headers: Headers = ()
    body: bytes = b""
    beginning: str = ""


@dataclass(frozen=True)
class Head:
    """What comes before a body: the status of HTTP, and headers with names in lower case."""

    status: int
    headers: Headers

    @property
    def streams(self) -> bool:
        """Whether the body's pieces are worth something each by itself."""
        return any(n == b"content-type" and v.startswith(STREAM) for n, v in self.headers)


def beginning_of(body: bytes) -> str:
    """What a body's pages begin with: its prompt, the first of several, or its messages.

    What is no body of ours has no beginning; that it is refused is left to who answers.
    """
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(given, dict):
        return ""
    if "messages" in given:
        # Templates put tools before messages.
        return _as_text([given.get("tools"), given["messages"]])
    prompt = given.get("prompt", given.get("query"))
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        prompt = prompt[0]
    return "" if prompt is None else prompt if isinstance(prompt, str) else _as_text(prompt)


def _as_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


async def answered(app: ASGIApp, asked: Asked) -> AsyncIterator[Head | bytes]:
    """The application's answer: its head, and the pieces of its body as they come.

    Closing the iterator is to the application as if the client had left.
    """
    pieces: asyncio.Queue[Head | bytes | None] = asyncio.Queue(maxsize=1)
    unread = [asked.body]

    async def receive() -> Message:
        if unread:
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        await asyncio.Event().wait()  # whoever has left cancels all of it
        raise AssertionError

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            await pieces.put(Head(message["status"], tuple(map(tuple, message["headers"]))))
        elif message["type"] == "http.response.body" and message.get("body"):
            await pieces.put(bytes(message["body"]))

    async def run() -> None:
        try:
            await app(_scope(asked), receive, send)
        finally:
            await pieces.put(None)

    task = asyncio.ensure_future(run())
    begun = False
    try:
        while (piece := await pieces.get()) is not None:
            begun = True
            yield piece
        if not begun:
            await task  # raises what kept it from answering; all else has been told the client
    finally:
        task.cancel()
        while not task.done():  # one that still has something to say would wait for ever
            with suppress(asyncio.QueueEmpty):
                pieces.get_nowait()
            await asyncio.wait((task,), timeout=0.01)
        if not task.cancelled():
            task.exception()  # looked at, so that nobody complains


def _scope(asked: Asked) -> Scope:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": asked.method,
        "scheme": "http",
        "path": asked.path,
        "raw_path": asked.path.encode(),
        "query_string": asked.query,
        "root_path": "",
        "headers": list(asked.headers),
        "client": None,
        "server": None,
        "state": {},
    }
