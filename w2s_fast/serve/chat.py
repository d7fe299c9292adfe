"""``/v1/chat/completions``: messages are answered, through the base's own chat template."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from w2s_fast.params import SearchParams
from w2s_fast.result import Hypothesis, SearchResult, TokenLogProbs
from w2s_fast.serve.completions import FINISH, MOST_LOGPROBS, searched, usage_of
from w2s_fast.serve.refusals import Refusal, as_refusal
from w2s_fast.serve.search_fields import SearchFields
from w2s_fast.serve.service import Service
from w2s_fast.serve.streams import event
from w2s_fast.serve.token_texts import TokenTexts
from w2s_fast.text import Chat


class Message(BaseModel):
    """One turn; the template sees further fields as they are."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: str
    content: str | list[dict[str, Any]] | None = None


class ChatBody(SearchFields):
    """What is to be answered, and how."""

    model: str | None = None
    messages: list[Message] = Field(min_length=1)
    stream: bool | None = None
    stream_options: dict[Literal["include_usage", "continuous_usage_stats"], bool] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


@dataclass(frozen=True)
class ChatJob:
    """A body, checked."""

    body: ChatBody
    chat: Chat
    params: SearchParams
    id: str
    created: int
    model: str

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def job_of(service: Service, body: ChatBody) -> ChatJob:
    """Refusal or InvalidRequest, before anything runs."""
    service.check_model(body.model)
    continues = bool(body.continue_final_message)
    if body.add_generation_prompt is not None and body.add_generation_prompt == continues:
        raise Refusal(
            400,
            "the answer begins behind the template's beginning of one, or goes on with the last "
            "message; allowed: add_generation_prompt, or continue_final_message",
            param="add_generation_prompt",
        )
    if body.stream and body.logprobs:
        raise Refusal(
            400, "a stream carries no logprobs; allowed: logprobs without stream", param="stream"
        )
    if body.top_logprobs and not body.logprobs:
        raise Refusal(400, "top_logprobs needs logprobs", param="top_logprobs")
    messages = [message.model_dump(exclude_unset=True) for message in body.messages]
    chat = Chat(messages, None, body.chat_template_kwargs, continues)
    name = service.settings.name
    return ChatJob(
        body, chat, service.params(body), f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), name
    )


async def answer(service: Service, job: ChatJob) -> dict[str, Any]:
    """The whole answer; hypotheses best first."""
    result = await service.search(job.chat, job.params)
    told: list[list[dict[str, Any]] | None] = [None] * len(result.hypotheses)
    if job.body.logprobs:
        told = await _logprobs(service, job, result)
    choices = [
        {
            "index": i,
            "message": {"role": "assistant", "content": hypothesis.text, "refusal": None},
            "logprobs": None if own is None else {"content": own, "refusal": None},
            **_end(hypothesis),
        }
        for i, (hypothesis, own) in enumerate(zip(result.hypotheses, told))
    ]
    return {
        **job.head("chat.completion"),
        "choices": choices,
        "usage": usage_of([result]),
        "w2s": searched(job.params, [result]),
    }


def _end(hypothesis: Hypothesis) -> dict[str, Any]:
    return {
        "finish_reason": FINISH[hypothesis.finish_reason],
        "stop_reason": hypothesis.stop_reason,
        "score": hypothesis.score,
    }


async def _logprobs(
    service: Service, job: ChatJob, result: SearchResult
) -> list[list[dict[str, Any]] | None]:
    engine, top = service.engine.engine, job.body.top_logprobs or 0

    def read() -> tuple[int, list[TokenLogProbs]]:
        prompt = engine.encode(job.chat)
        texts = [prompt + hypothesis.token_ids for hypothesis in result.hypotheses]
        return len(prompt), engine.log_probs(texts, top=top)

    length, told = await service.beside(read)
    return [_rendered(service, own, length) for own in told]


def _rendered(service: Service, told: TokenLogProbs, first: int) -> list[dict[str, Any]]:
    texts = TokenTexts(service.tokenizer, told.token_ids)

    def entry(place: int, token: int, value: float | None) -> dict[str, Any]:
        shown = texts.text(place, token)
        return {"token": shown, "logprob": value, "bytes": list(shown.encode("utf-8", "replace"))}

    return [
        entry(place, told.token_ids[place], told.logprobs[place])
        | {"top_logprobs": [entry(place, *pair) for pair in (told.top[place] or {}).items()]}
        for place in range(first, len(told.token_ids))
    ]


async def stream(service: Service, job: ChatJob) -> AsyncIterator[bytes]:
    """Server-sent events. Of several hypotheses the best one grows, and the others come whole."""

    def chunk(index: int, delta: dict[str, Any], hypothesis: Hypothesis | None = None) -> bytes:
        choice: dict[str, Any] = {"index": index, "delta": delta, "logprobs": None}
        choice |= {"finish_reason": None} if hypothesis is None else _end(hypothesis)
        return event({**job.head("chat.completion.chunk"), "choices": [choice]})

    def begin(index: int) -> bytes:
        return chunk(index, {"role": "assistant", "content": ""})

    begun = False
    result: SearchResult | None = None
    try:
        told = service.stream(job.chat, job.params)
        async with aclosing(told) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                if not begun:
                    begun = True
                    yield begin(0)
                if piece.text:
                    yield chunk(0, {"content": piece.text})
                result = piece.result
        assert result is not None
        best, *others = result.hypotheses
        yield chunk(0, {}, best)
        for i, other in enumerate(others, 1):
            yield begin(i)
            yield chunk(i, {"content": other.text or ""})
            yield chunk(i, {}, other)
        if (job.body.stream_options or {}).get("include_usage"):
            more = {"usage": usage_of([result]), "w2s": searched(job.params, [result])}
            yield event({**job.head("chat.completion.chunk"), "choices": [], **more})
    except Exception as error:
        if not begun:  # there is still a status to say it with
            raise
        yield event(as_refusal(error).body)
        return
    yield event("[DONE]")
