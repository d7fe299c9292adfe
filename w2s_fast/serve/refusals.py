"""Errors as clients of OpenAI's API know them: ``{"error": {message, type, param, code}}``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from w2s_fast.errors import Aborted, EngineFailure, InvalidRequest, W2SFastError

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_KINDS = ("str", "int", "float", "bool", "dict", "list")
TOO_LARGE = "body_too_large"
_LONGEST = 2000  # characters of a message: it may quote what was given


class Refusal(Exception):
    """An answer other than what was asked for.

    Attributes:
        status: of HTTP. param: the field of the body that is to blame. code: a word for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        message = self.message
        if len(message) > _LONGEST:
            message = f"{message[:_LONGEST]}..."
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


class JSON(Response):
    """A body as JSON in ASCII: text that a model wrote may hold what UTF-8 cannot spell."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def as_refusal(error: Exception) -> Refusal:
    """What a client is told of an error."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, InvalidRequest):
        # "n is 8; allowed: ..." names its field.
        first = re.match(r"([a-z_]\w*) (?:is|has|holds|must) ", str(error))
        return Refusal(400, str(error), param=first[1] if first else None)
    if isinstance(error, (EngineFailure, Aborted)):
        return Refusal(503, str(error), code="engine_unavailable")
    if isinstance(error, W2SFastError):
        return Refusal(500, str(error), code="search_failed")
    return Refusal(500, "the server failed; its log says why", code="internal_error")


def refusal_of_body(error: RequestValidationError) -> Refusal:
    """Of a body that does not have the shape that is wanted: its first fault."""
    first = error.errors()[0]
    if first["loc"] == ("body",) and isinstance(first.get("input"), (bytes, str)):
        # Else any page that a browser shows could have it send bodies here.
        return Refusal(400, "the body is not sent as JSON; allowed: Content-Type: application/json")
    # Of a field that may be several kinds of value the place names the kind that was tried, too.
    _, *found = first["loc"]
    place = [str(part) for part in found if part not in _KINDS and "[" not in str(part)]
    names, where = place[:1], ".".join(place)
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return Refusal(400, f"the body is no JSON: {first.get('ctx', {}).get('error', message)}")
    return Refusal(
        400, f"{where}: {message}" if where else message, param=names[0] if names else None
    )


def respond(refusal: Refusal) -> JSON:
    return JSON(refusal.body, refusal.status, headers=dict(refusal.headers or {}))


def install(app: FastAPI) -> None:
    """Have every error of the application answered so."""

    async def refused(_: Request, error: Exception) -> Response:
        return respond(as_refusal(error))

    async def malformed(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return respond(refusal_of_body(error))

    async def http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = TOO_LARGE if error.status_code == 413 else None
        refusal = Refusal(error.status_code, str(error.detail), code=code, headers=error.headers)
        return respond(refusal)

    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Refusal, refused)
    app.add_exception_handler(W2SFastError, refused)
    app.add_exception_handler(Exception, refused)  # it is raised again behind that, for the log
