"""Trial: what a server can do, tried once, with requests for a token each."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any

from w2s_fast.errors import RemoteFailure
from w2s_fast.remote.account import Account, Budget
from w2s_fast.remote.base import RemoteBase
from w2s_fast.remote.dialect import CHAT, COMPLETIONS, OPTIONAL, WAYS, Body, Dialect
from w2s_fast.remote.failures import Answered
from w2s_fast.remote.prompt import RemotePrompt

log = logging.getLogger("w2s_fast.remote")

_PROMPT = "Name a number."
_BEGUN = "The number that I choose is 7319"  # nobody begins an answer so by chance
_SAMPLING = {"temperature": 0.5, "top_p": 0.9, "top_k": 50, "min_p": 0.001, "seed": 1}
_SEED = frozenset(("seed",))
_NOTHING = Dialect(texts=False, messages=False)
# From those that take all to those that take least.
_KINDS = (
    _NOTHING,
    replace(_NOTHING, packed=True),
    replace(_NOTHING, optional=_SEED),
    replace(_NOTHING, optional=frozenset()),
)
_LENGTHS = ("max_tokens", "max_completion_tokens")

# Sends a body to a route; its answer, or what the error was.
Send = Callable[[str, Body], Awaitable[Any]]


async def find_dialect(
    send: Send, base: RemoteBase, where: str
) -> tuple[Dialect, dict[str, Answered]]:
    """What the server takes, and what it said where it has no route.

    Args:
        send: raises what the openai client does. where: the server, as errors call it.

    Raises:
        RemoteFailure: it cannot be used; says why.
    """
    refused: dict[str, Answered] = {}
    texts = messages = None
    if base.route != "chat":
        texts = await _first(send, base, where, COMPLETIONS, _texts(), refused)
    if base.route != "completions":
        # What was found for texts is most likely right for chats, too.
        messages = await _first(
            send, base, where, CHAT, _chats(base, texts), refused, others=texts is not None
        )
    if texts is None and messages is None:
        route, answered = next(iter(refused.items()))
        raise answered.failure(where, f"a token by {route}")
    found = messages or texts
    assert found is not None
    if texts is not None:
        found = replace(found, texts=True, optional=found.optional & texts.optional)
    log.info("%s: %s", where, told(found))
    return found, refused


def told(found: Dialect) -> str:
    """What was found, in words."""
    routes = [name for name, there in (("texts", found.texts), ("chats", found.messages)) if there]
    parts = [" and ".join(routes)]
    if found.messages:
        parts.append(f"chats go on by {found.continuation}")
    missing = sorted(OPTIONAL - found.optional)
    if missing:
        parts.append(f"it takes no {', '.join(missing)}")
    return "; ".join(parts)


def _texts() -> Iterator[Dialect]:
    for own in _KINDS:
        yield replace(own, texts=True, messages=False)


def _chats(base: RemoteBase, texts: Dialect | None) -> Iterator[Dialect]:
    kinds = _KINDS if texts is None else (replace(texts, texts=False), *_KINDS)
    ways = [way for way in WAYS if base.continuation in ("auto", way)]
    for own in dict.fromkeys(kinds):
        for length in _LENGTHS:
            for way in ways:
                yield replace(own, messages=True, continuation=way, length=length)


async def _first(
    send: Send,
    base: RemoteBase,
    where: str,
    route: str,
    dialects: Iterator[Dialect],
    refused: dict[str, Answered],
    *,
    others: bool = False,
) -> Dialect | None:
    """The first of these that is not refused; None: the server has no such route.

    Args:
        refused: gets what was said last. others: whether there is another route: then this one may
            fail in any way.
    """
    prompt = RemotePrompt(_PROMPT, _SAMPLING, Account(Budget()))
    behind = _BEGUN if route == CHAT else ""
    for dialect in dialects:
        body = {**dialect.body(prompt, behind), dialect.length_of(route): 1}
        try:
            answer = await send(route, body)
            samples = dialect.samples(prompt, behind, answer, 1)
        except Exception as error:
            answered = refused[route] = Answered(error, base.secrets)
            if answered.no_field and not answered.no_template:
                continue  # as far as one can tell, another body may be taken
            if others or answered.no_route or answered.no_template or answered.is_no_answer:
                return None
            raise answered.failure(where, f"a token by {route}") from None
        if any(sample.text.startswith(_BEGUN) for sample in samples):
            dialect = replace(dialect, echoes=True)
        return dialect
    return None


def only_model(listed: list[str], where: str) -> str:
    """The model that a server has, where none was named. RemoteFailure: there are others."""
    if len(listed) == 1:
        return listed[0]
    names = ", ".join(listed[:10]) or "it lists none"
    raise RemoteFailure(f"{where}: no model was named; give model, one of: {names}")
