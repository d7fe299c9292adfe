"""What every request passes before its route: its size, its key, its id, and a line in the log."""

from __future__ import annotations

import hmac
import logging
import time
import uuid
from typing import Any

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from w2s_fast.serve.refusals import TOO_LARGE, Refusal, respond
from w2s_fast.serve.settings import ServerSettings
from w2s_fast.serve.spans import INCOMING, REQUEST_ID

log = logging.getLogger("w2s_fast.serve")
_OPEN = ("/health", "/ready", "/metrics", "/")  # without a key: these say nothing of anybody's text
_LONGEST_ID = 128


class Guard:
    """Refuses bodies that are too large, and requests without a key; logs all of them."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._most = settings.limits.body_bytes
        self._keys = [key.get_secret_value().encode() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", b"").decode("ascii", "replace")
        fine = given.isprintable() and 0 < len(given) <= _LONGEST_ID
        request_id = given if fine else uuid.uuid4().hex
        REQUEST_ID.set(request_id)
        INCOMING.set({name.decode("latin-1"): v.decode("latin-1") for name, v in headers.items()})
        begin = time.perf_counter()
        status = 499  # as nginx has it: the client left before there was an answer

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = [(b"x-request-id", request_id.encode())]
                message = {**message, "headers": [*message.get("headers", ()), *own]}
            await send(message)

        try:
            refusal = self._refused(scope, headers)
            if refusal is None:
                await self._app(scope, _Bounded(receive, self._most), send_with_id)
            else:
                await respond(refusal)(scope, receive, send_with_id)
        except Exception:
            status = 500 if status == 499 else status
            raise
        finally:
            fields: dict[str, Any] = {
                "request_id": request_id,
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "seconds": round(time.perf_counter() - begin, 4),
            }
            log.info("request", extra=fields)

    def _refused(self, scope: Scope, headers: dict[bytes, bytes]) -> Refusal | None:
        length = headers.get(b"content-length", b"0")
        if not length.isdigit():
            return Refusal(400, "content-length is no number")
        if int(length) > self._most:
            return self._too_large()
        if self._keys and scope["path"] not in _OPEN:
            kind, _, key = headers.get(b"authorization", b"").partition(b" ")
            found = kind.lower() == b"bearer" and any(
                hmac.compare_digest(key.strip(), own) for own in self._keys
            )
            if not found:
                return Refusal(
                    401,
                    "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        return None

    def _too_large(self) -> Refusal:
        return Refusal(413, _too_large(self._most), code=TOO_LARGE)


def _too_large(most: int) -> str:
    return f"the body is too large; allowed: {most} bytes"


class _Bounded:
    """Receives a body of bounded size, whatever its header says."""

    def __init__(self, receive: Receive, most: int) -> None:
        self._receive = receive
        self._most = self._left = most

    async def __call__(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._left -= len(message.get("body", b""))
            if self._left < 0:
                # FastAPI, which reads bodies, lets only errors of this kind through.
                raise HTTPException(413, _too_large(self._most))
        return message
