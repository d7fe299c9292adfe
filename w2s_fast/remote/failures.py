"""What a server's errors mean, and what to change; no key is in what is said of them."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import openai

from w2s_fast.errors import RemoteFailure

_LONGEST = 500  # characters of what a server says
_FULL = re.compile(
    r"context_length_exceeded|exceed_context_size|context[ _-]?(length|window|size)|max_model_len"
    r"|maximum (model|sequence|input)[ \w]* length|tokens .*allowed: \d+ together",
    re.IGNORECASE,
)
_NO_MODEL = re.compile(
    r"model_not_found|unknown model"
    r"|model\b.*(not exist|not found|not served|unknown|not available)",
    re.IGNORECASE | re.DOTALL,
)


class Answered:
    """An error of the openai client, as far as it matters here.

    Attributes:
        status: of HTTP; None: there was no answer. said: by the server, or of the connection.
        is_no_answer: something came that is none.
    """

    def __init__(self, error: Exception, secrets: Collection[str] = ()) -> None:
        """``secrets``: what is not to be repeated of it."""
        self.status: int | None = None
        self.is_no_answer = isinstance(error, ValueError)
        said = f"{type(error).__name__}: {error}"
        if isinstance(error, openai.APIStatusError):
            self.status = error.status_code
            said = _said(error)
        elif isinstance(error, openai.APITimeoutError):
            said = "it did not answer in time"
        elif isinstance(error, openai.APIConnectionError):
            cause = error.__cause__
            said = f"no connection: {type(cause).__name__}: {cause}" if cause else str(error)
        for secret in secrets:
            said = said.replace(secret, "...")
        self.said = said if len(said) <= _LONGEST else f"{said[:_LONGEST]}..."

    @property
    def context_is_full(self) -> bool:
        """Whether prompt and answer do not fit into the model's context together."""
        return self.status in (400, 413, 422, 500) and bool(_FULL.search(self.said))

    @property
    def no_model(self) -> bool:
        """Whether there is no model of the name."""
        return (
            self.status in (400, 404)
            and bool(_NO_MODEL.search(self.said))
            and "endpoint" not in self.said
        )

    @property
    def no_route(self) -> bool:
        """Whether the server has not got what was asked for."""
        return self.status in (404, 405, 501) and not self.no_model

    @property
    def no_field(self) -> bool:
        """Whether it may be a field of the body that the server refuses."""
        return self.status in (400, 422) and not self.no_model

    @property
    def no_template(self) -> bool:
        """Whether the model has nothing that writes chats out."""
        return "chat template" in self.said.lower() or "chat_template is not set" in self.said

    def failure(self, where: str, asked: str) -> RemoteFailure:
        """``where``: the server. ``asked``: what it was asked for."""
        status = "" if self.status is None else f"{self.status}: "
        return RemoteFailure(f"{where}: {asked}: {status}{self.said}; {self._change}")

    @property
    def _change(self) -> str:
        if self.status in (401, 403):
            return "give the key that it wants as api_key"
        if self.no_model:
            return "name a model that it has"
        if self.no_route:
            return "check the url (it ends with /v1, mostly), or give another route"
        if self.status == 429:
            return "give a smaller max_concurrency, or more max_retries"
        if self.status is None:
            return "check the url, and that it runs; or give a larger timeout or more max_retries"
        if self.status >= 500:
            return "its own log says why; more max_retries try longer"
        return "its answer says what it takes; extra_body has fields of your own"


def _said(error: openai.APIStatusError) -> str:
    """The message of an answer, and its code."""
    body: Any = error.body
    if isinstance(body, dict):
        message = body.get("message") or body.get("detail") or body.get("error")
        code = body.get("code")
        if isinstance(message, str):
            return f"{message} ({code})" if isinstance(code, str) else message
        if message is not None:
            return str(message)
    if isinstance(body, str) and body:
        return body
    return str(error.message)
