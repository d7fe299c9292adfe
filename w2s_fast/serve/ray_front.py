"""The thin process in front: takes requests in, has a replica answer, and asks again if it dies.

Serve's proxy does not: a request whose replica dies under it is lost.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from fastapi import HTTPException
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from ray.exceptions import ObjectLostError, RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from w2s_fast.serve.carried import Asked, Head, beginning_of
from w2s_fast.serve.refusals import TOO_LARGE, Refusal, as_refusal, respond
from w2s_fast.serve.spans import REQUEST_ID
from w2s_fast.serve.streams import event

log = logging.getLogger("w2s_fast.serve")

TRIES = 3  # of a request: one that kills whoever answers it kills no more than that
_LOST = (RayActorError, ObjectLostError)  # a replica, its node, or what it had said


class Forwarder:
    """An ASGI application whose answers are those of replicas, a whole request each.

    An answer begins when nothing can go wrong any more that another replica could do better: a
    whole one when all of it is there, a stream with its first piece. A stream that breaks off
    later ends with an error, as it does where a search fails.
    """

    def __init__(self, replicas: DeploymentHandle, seconds: float) -> None:
        """``seconds``: that a request may take, waiting for a replica included."""
        self._replicas = replicas
        self._answer = replicas.options(method_name="answer", stream=True)
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        if scope["type"] != "http":
            return
        try:
            asked = await _read(scope, receive)
            if asked.path == "/metrics":
                await _send_whole(send, *await self._metrics())
            else:
                await self._forward(asked, send)
        except HTTPException as error:  # of what reads bodies of bounded size
            code = TOO_LARGE if error.status_code == 413 else None
            refusal = Refusal(error.status_code, str(error.detail), code=code)
            await respond(refusal)(scope, receive, send)
        except Refusal as refusal:
            await respond(refusal)(scope, receive, send)

    async def _forward(self, asked: Asked, send: Send) -> None:
        try:
            head, first, rest = await asyncio.wait_for(self._begun(asked), self._seconds)
        except asyncio.TimeoutError:
            raise Refusal(
                504,
                f"the request took more than {self._seconds:g} s and was given up",
                code="timeout",
            ) from None
        if rest is None:
            await _send_whole(send, head, first)
            return
        try:
            await send(_start(head))
            await send(_piece(first, more=True))
            async for piece in rest:
                await send(_piece(piece, more=True))
        except _LOST as error:
            log.warning("replica lost within a stream", extra={"error": type(error).__name__})
            lost = Refusal(503, "the replica was lost; ask again", code="replica_lost")
            await send(_piece(event(as_refusal(lost).body), more=True))
        finally:
            rest.cancel()
        await send(_piece(b"", more=False))

    async def _begun(self, asked: Asked) -> tuple[Head, bytes, Any]:
        """Head, first piece, and the other ones; head, body and None of an answer that is whole."""
        for left in reversed(range(TRIES)):
            pieces = self._answer.remote(asked)
            streams = False
            try:
                head = await anext(pieces)
                streams = head.streams
                if streams:
                    return head, await anext(pieces), pieces
                return head, b"".join([piece async for piece in pieces]), None
            except StopAsyncIteration:
                raise Refusal(500, "the replica gave no answer", code="internal_error") from None
            except _LOST as error:
                streams = False
                log.warning(
                    "replica lost, asking another one",
                    extra={"error": type(error).__name__, "tries_left": left},
                )
                # Whoever died is known to be dead by then, everywhere.
                await asyncio.sleep(0.1 * (TRIES - left))
            except BackPressureError:
                raise Refusal(
                    429,
                    "all replicas are busy, and as many requests wait as may; try again in 1 s",
                    code="queue_full",
                    headers={"Retry-After": "1"},
                ) from None
            except DeploymentUnavailableError as error:
                raise Refusal(503, str(error), code="engine_unavailable") from None
            finally:
                if not streams:  # it is over, or nobody waits for it
                    with suppress(Exception):
                        pieces.cancel()
        raise Refusal(
            503, f"{TRIES} replicas were lost one after the other", code="engine_unavailable"
        )

    async def _metrics(self) -> tuple[Head, bytes]:
        told = await self._replicas.broadcast("metrics").results_async(timeout_s=10)
        content = b"text/plain; version=0.0.4; charset=utf-8"
        return Head(200, ((b"content-type", content),)), merged(dict(told))


class OneId:
    """Leaves an answer's id to Serve's proxy, which adds the same."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def without_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(n, v) for n, v in message["headers"] if n.lower() != b"x-request-id"]
                message = {**message, "headers": own}
            await send(message)

        await self._app(scope, receive, without_id)


class _Merged(Collector):
    def __init__(self, families: Mapping[str, Metric]) -> None:
        self._families = families

    def collect(self) -> Any:
        yield from self._families.values()


def merged(told: Mapping[str, str]) -> bytes:
    """What replicas tell Prometheus, by their names, as one text; ``replica`` is a label more."""
    families: dict[str, Metric] = {}
    for name, text in told.items():
        for family in text_string_to_metric_families(text):
            kept = families.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            for sample in family.samples:
                labels = {**sample.labels, "replica": name}
                kept.samples.append(sample._replace(labels=labels))
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Merged(families))
    return generate_latest(registry)


async def _read(scope: Scope, receive: Receive) -> Asked:
    body = b""
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            break
        body += message.get("body", b"")
        more = message.get("more_body", False)
    own = [(name, value) for name, value in scope["headers"] if name != b"x-request-id"]
    return Asked(
        scope["method"],
        scope["path"].removeprefix(scope.get("root_path", "")) or "/",
        scope.get("query_string", b""),
        (*map(tuple, own), (b"x-request-id", REQUEST_ID.get().encode())),
        body,
        beginning_of(body),
    )


def _start(head: Head, length: int | None = None) -> Message:
    # The guard in front adds the request's id itself; it is the same.
    own = [(n, v) for n, v in head.headers if n not in (b"x-request-id", b"content-length")]
    if length is not None:
        own.append((b"content-length", str(length).encode()))
    return {"type": "http.response.start", "status": head.status, "headers": own}


def _piece(body: bytes, *, more: bool) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


async def _send_whole(send: Send, head: Head, body: bytes) -> None:
    await send(_start(head, len(body)))
    await send(_piece(body, more=False))


async def _live(receive: Receive, send: Send) -> None:
    """There is nothing to be started or stopped."""
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return
