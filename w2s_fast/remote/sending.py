"""Sending: what leaves for a server. Each request has the headers that are its own, and is counted.

What the openai client would send along besides, from environment variables too, is nobody's
business here, and it never sees a key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import openai

from w2s_fast.remote.base import RemoteBase

_USUAL = frozenset(
    (
        *("host", "accept", "accept-encoding", "connection", "user-agent"),
        *("content-type", "content-length", "transfer-encoding"),
    )
)
_may_send: ContextVar[Callable[[], bool] | None] = ContextVar("may_send", default=None)


class Spent(openai.OpenAIError):
    """A request may not be sent again."""


@contextmanager
def counted(may_send: Callable[[], bool]) -> Iterator[None]:
    """For ``with``: of each request, those that are tried again too, it is asked whether it may be
    sent. Raises ``Spent`` where not."""
    token = _may_send.set(may_send)
    try:
        yield
    finally:
        _may_send.reset(token)


def connections(base: RemoteBase) -> Any:
    """A pool of them."""
    own = {name: str(value) for name, value in base.headers.items()}
    if base.api_key is not None and "authorization" not in map(str.lower, own):
        own["Authorization"] = f"Bearer {base.api_key}"
    pool: Any

    async def leave(request: Any) -> None:
        ask = _may_send.get()
        if ask is not None and not ask():
            raise Spent()
        for name in list(request.headers):
            if name.lower() not in _USUAL and not name.lower().startswith("x-stainless-"):
                del request.headers[name]
        # A redirection may lead to somebody else.
        if _origin(request.url) == _origin(pool.base_url):
            request.headers.update(own)

    pool = openai.DefaultAsyncHttpxClient(base_url=base.url, event_hooks={"request": [leave]})
    return pool


def _origin(url: Any) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port
