"""Intake where the base is remote: from prompts and parameters to what its server is sent."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from w2s_fast.engine.foreign import foreign_prompt
from w2s_fast.engine.served import ServedModels
from w2s_fast.errors import InvalidRequest
from w2s_fast.params import SearchParams
from w2s_fast.remote import (
    EOS,
    Account,
    Budget,
    RemotePrompt,
    Source,
    Utf8Breaks,
    Utf8Stops,
)
from w2s_fast.search import ForeignPrompt, Request
from w2s_fast.text import PLACEHOLDER, Chat, Prompt, check_template_text, check_unicode, plain_chat

_METHODS = ("cbs", "bon", "sample")
_BEGIN = [EOS]  # in the place of a prompt's tokens: what comes before a response is not known


class RemoteIntake:
    """Checks what comes in, and writes it for the server. Any thread may call it."""

    def __init__(
        self,
        source: Source,
        budget: Budget,
        models: ServedModels,
        template: str | None,
        *,
        has_scorers: bool,
    ) -> None:
        """InvalidRequest: a template that cannot be used."""
        if template is not None:
            check_template_text("base", template)
        self._source = source
        self._budget = budget
        self._models = models
        self._template = template
        self._has_scorers = has_scorers

    def request(self, prompt: Prompt, params: SearchParams, priority: int) -> Request:
        """One prompt as a request that the engine can serve. InvalidRequest."""
        self._check(params, priority)
        remote = self._prompt(prompt, params)
        foreign = self._models.foreign if params.uses_guides else None
        in_foreign: ForeignPrompt | None = None
        if foreign is not None:
            in_foreign = foreign_prompt(foreign, prompt, self._models.encoder_of, None)
        return Request(
            _BEGIN,
            [],
            params,
            int(priority),
            [EOS],
            given=prompt,
            has_scorers=self._has_scorers,
            ends=Utf8Stops(params.stop) if params.stop else None,
            foreign=in_foreign,
            has_guides=False,
            remote=remote,
        )

    def _check(self, params: SearchParams, priority: int) -> None:
        if not isinstance(params, SearchParams):
            raise InvalidRequest(f"params is {type(params).__name__}; allowed: SearchParams")
        if isinstance(priority, bool) or not isinstance(priority, (int, np.integer)):
            raise InvalidRequest(f"priority is {priority!r}; allowed: an integer")
        if params.method not in _METHODS:
            raise _not_here("method", params.method, ", ".join(map(repr, _METHODS)))
        if params.proposal != "base":
            raise _not_here("proposal", params.proposal, "'base'")
        if params.stop_token_ids:
            raise _not_here("stop_token_ids", params.stop_token_ids, "stop, with strings")
        if params.min_new_tokens:
            raise _not_here("min_new_tokens", params.min_new_tokens, "0")
        if params.ignore_eos:
            raise _not_here("ignore_eos", True, "False")
        if params.uses_guides and not self._models.guides and not self._has_scorers:
            raise InvalidRequest(f"method {params.method!r} needs guides; the engine has none")

    def _prompt(self, prompt: Prompt, params: SearchParams) -> RemotePrompt:
        _check_no_ids(prompt)
        if (why := self._source.accepts(prompt)) is not None:
            raise InvalidRequest(why)
        breaks = Utf8Breaks(params.chunk_stop) if params.chunk_stop else None
        own = (self._sampling(params), Account(self._budget), breaks, params.temperature == 0)
        if isinstance(prompt, str):
            check_unicode(prompt, "a prompt")
            before, after = (
                ("", "") if self._template is None else self._template.split(PLACEHOLDER)
            )
            return RemotePrompt(f"{before}{prompt}{after}", *own)
        given: Any = prompt
        chat = plain_chat(given if isinstance(given, Chat) else Chat(given))
        options: dict[str, Any] = {}
        if chat["tools"] is not None:
            options["tools"] = chat["tools"]
        if chat["options"]:
            options["chat_template_kwargs"] = chat["options"]
        messages = chat["messages"]
        continues = isinstance(given, Chat) and given.continue_final_message
        if continues and not isinstance(messages[-1].get("content"), str):
            raise InvalidRequest("a chat goes on with its last message; allowed: one with a text")
        return RemotePrompt(messages, *own, continues, options)

    def _sampling(self, params: SearchParams) -> dict[str, Any]:
        """The fields that a server has for it."""
        if params.temperature == 0:
            return {"temperature": 0.0}
        # Those that are off, too: a server may have other defaults.
        found = {name: getattr(params, name) for name in ("temperature", "top_p", "top_k", "min_p")}
        for name in sorted(self._source.lacks(found)):
            value = found.pop(name)
            if value:
                warnings.warn(
                    f"{self._source.about}: {name}={value} has no effect there", stacklevel=2
                )
        return found


def _check_no_ids(prompt: Any) -> None:
    """InvalidRequest: it is token ids."""
    several = isinstance(prompt, Sequence) and not isinstance(prompt, (str, bytes))
    if hasattr(prompt, "ndim") or (
        several and all(isinstance(item, (int, np.integer)) for item in prompt)
    ):
        raise InvalidRequest(
            "a prompt of token ids is nothing that a remote base could read; allowed: a string, a "
            "list of chat messages, or a Chat"
        )


def _not_here(name: str, value: Any, allowed: str) -> InvalidRequest:
    return InvalidRequest(
        f"{name} is {value!r}, which needs the base's own tokens; allowed with a remote base: "
        f"{allowed}"
    )
