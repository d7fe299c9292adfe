"""RemoteBase: a base model behind an OpenAI-compatible server, as a caller names it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal, TypeAlias, get_args
from urllib.parse import urlsplit

from w2s_fast.errors import InvalidRequest
from w2s_fast.remote.account import Budget
from w2s_fast.remote.replay import traces_of
from w2s_fast.result import SearchResult, Trace

Route = Literal["auto", "completions", "chat"]
Continuation = Literal["auto", "continue_final_message", "prefix", "plain"]
Recorded: TypeAlias = Trace | SearchResult | Mapping[str, Any]
# Of a body, what is right only as the search has it.
_OWN_FIELDS = frozenset(
    ("model", "prompt", "messages", "n", "max_tokens", "max_completion_tokens", "seed", "stream")
)
_SHORTEST_SECRET = 8  # characters of a header's value


@dataclass(frozen=True)
class RemoteBase:
    """A base of which only samples are needed, behind any OpenAI-compatible server.

    Example::

        base = RemoteBase("http://localhost:8000/v1", model="Qwen3-32B", max_requests=200)
        engine = Engine(base=base, guides=Guide(tuned="gpt2-imdb", untuned="gpt2"))

    A round asks for K continuations of each text that was kept, and sends on what came back, byte
    for byte. What the server can do is tried once, when the engine is made. Guides read texts, each
    in its own vocabulary. Methods: ``cbs``, ``bon`` and ``sample``. See docs/remote.md.

    Args:
        url: up to ``/v1``. model: its name there; None: the only one that the server lists.
        api_key: sent as a bearer token. No environment variable is read for it.
        route: ``"completions"``: texts go on; ``"chat"``: a prompt becomes a user's message, and a
            partial answer the assistant's last one. ``"auto"``: texts by the first where the server
            has it, messages by the second.
        continuation: how a chat server is told to go on with the last message; ``"auto"``: by the
            first of these that it knows. With ``"plain"`` it may begin a new turn instead.
        max_concurrency: requests under way at most.
        timeout: seconds that an answer may take.
        max_retries: of a request that failed in passing (408, 409, 429, 5xx, connections, bodies
            that are cut off), with growing pauses, or those that the server asks for.
        max_requests, max_total_tokens: of one search; it ends with what it has. Tokens are those
            that the server reads and samples, by its own count.
        price_per_million: of tokens that are read, and that are sampled: for ``usage.remote.cost``.
        extra_body: further fields of every request, such as ``{"chat_template_kwargs": ...}``.
        headers: of every request.

    Raises:
        InvalidRequest: an argument is not allowed.
    """

    url: str
    model: str | None = None
    _: KW_ONLY
    api_key: str | None = field(default=None, repr=False)
    route: Route = "auto"
    continuation: Continuation = "auto"
    max_concurrency: int = 16
    timeout: float = 120.0
    max_retries: int = 5
    max_requests: int | None = None
    max_total_tokens: int | None = None
    price_per_million: tuple[float, float] | None = None
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    recorded: tuple[Trace, ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._check_url()
        self._check_fields()
        for name, low in (("max_concurrency", 1), ("max_retries", 0)):
            _check_int(name, getattr(self, name), low)
        for name in ("max_requests", "max_total_tokens"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 1)
        if not _is_number(self.timeout) or self.timeout <= 0:
            raise InvalidRequest(f"timeout is {self.timeout!r}; allowed: seconds > 0")
        for name, kind in (("route", Route), ("continuation", Continuation)):
            if getattr(self, name) not in get_args(kind):
                allowed = ", ".join(map(repr, get_args(kind)))
                raise InvalidRequest(f"{name} is {getattr(self, name)!r}; allowed: {allowed}")
        prices = self.price_per_million
        if prices is not None and not (
            isinstance(prices, (tuple, list))
            and len(prices) == 2
            and all(_is_number(price) and price >= 0 for price in prices)
        ):
            raise InvalidRequest(
                f"price_per_million is {prices!r}; allowed: a pair of numbers >= 0: of tokens that "
                "are read, and that are sampled"
            )

    def _check_url(self) -> None:
        parts = urlsplit(self.url) if isinstance(self.url, str) else None
        if parts is not None and (parts.username is not None or parts.password is not None):
            raise InvalidRequest("url holds a name or a password; allowed: api_key, or headers")
        if parts is not None and (parts.query or parts.fragment):
            raise InvalidRequest("url holds a query; allowed: api_key, headers, or extra_body")
        if parts is None or parts.scheme not in ("http", "https") or not parts.netloc:
            raise InvalidRequest(f"url is {self.url!r}; allowed: as http://host:8000/v1")

    def _check_fields(self) -> None:
        """What is wrong with a key is not shown."""
        if self.api_key is not None and not _is_header(self.api_key):
            raise InvalidRequest(
                "api_key is no key; allowed: printable ASCII, without spaces or line ends around it"
            )
        headers = self.headers.items() if isinstance(self.headers, Mapping) else [(None, None)]
        for name, value in headers:
            if not (_is_header(name) and _is_header(value)):
                raise InvalidRequest("headers are none; allowed: names and values in ASCII")
        try:
            sound = isinstance(self.extra_body, Mapping) and bool(json.dumps({**self.extra_body}))
        except (TypeError, ValueError):
            sound = False
        if not sound:
            raise InvalidRequest("extra_body is no JSON; allowed: names and plain values")
        for name in self.extra_body:
            if name in _OWN_FIELDS:
                raise InvalidRequest(f"extra_body holds {name!r}, which a search sets itself")

    @property
    def secrets(self) -> list[str]:
        """What nobody is shown: the key, and what headers say, the longest first."""
        words = [word for value in self.headers.values() for word in (value, *value.split())]
        found = {word for word in words if len(word) >= _SHORTEST_SECRET}
        if self.api_key is not None:
            found.add(self.api_key)
        return sorted(found, key=len, reverse=True)

    @classmethod
    def replay(cls, recorded: Recorded | Iterable[Recorded] | str | os.PathLike[str]) -> RemoteBase:
        """A base that answers as a server did, without it: what traces of searches recorded.

        A search that is asked again, with the same parameters and guides, finds the same. Where it
        asks for something else than it did then, it ends with
        :class:`w2s_fast.errors.RemoteFailure`.

        Args:
            recorded: traces of searches in a remote base, results with them, or what
                ``w2s-fast generate --trace`` wrote of them: records, or the path of their file.

        Raises:
            InvalidRequest: there are none.
        """
        return cls("http://replay.invalid/v1", recorded=tuple(traces_of(recorded)))

    @property
    def budget(self) -> Budget:
        """Of each search."""
        return Budget(self.max_requests, self.max_total_tokens, self.price_per_million)


def _is_header(value: Any) -> bool:
    sound = isinstance(value, str) and value.isascii() and value.isprintable()
    return sound and value == value.strip() != ""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_int(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise InvalidRequest(f"{name} is {value!r}; allowed: an integer >= {low}")
