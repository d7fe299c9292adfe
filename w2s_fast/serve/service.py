"""The engine as the routes use it: what comes in is counted, timed, and given up in time."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, aclosing
from dataclasses import asdict
from typing import Any, TypeVar

import anyio
from transformers import PreTrainedTokenizerBase

from w2s_fast.engine import AsyncEngine, StreamPiece
from w2s_fast.params import SearchParams
from w2s_fast.result import Round, SearchResult
from w2s_fast.serve.gate import Gate
from w2s_fast.serve.metrics import Metrics
from w2s_fast.serve.refusals import Refusal
from w2s_fast.serve.search_fields import SearchFields
from w2s_fast.serve.settings import ServerSettings
from w2s_fast.serve.spans import REQUEST_ID, RequestSpan, request_span
from w2s_fast.text import Chat, Prompt, decode_response

T = TypeVar("T")
log = logging.getLogger("w2s_fast.serve")


class Service:
    """One engine, and the clients that share it.

    Attributes:
        started: seconds since 1970.
    """

    def __init__(
        self, engine: AsyncEngine, settings: ServerSettings, defaults: SearchParams
    ) -> None:
        """``defaults``: of searches whose body does not say."""
        self.engine = engine
        self.settings = settings
        self.defaults = defaults
        self.gate = Gate(settings.limits.queue)
        self.metrics = Metrics(settings.name, engine.stats)
        self.started = int(time.time())

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's. Refusal: it has none."""
        found = self.engine.engine.tokenizer
        if found is None:
            raise Refusal(400, "the base has no tokenizer; allowed: prompts of token ids")
        return found

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids that begin one, without special tokens."""
        ids = list(token_ids)
        found = self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(found)

    def decoder(self, prompt: Prompt) -> Callable[[list[int]], str]:
        """For responses to this prompt. Without a tokenizer they are shown as numbers."""
        engine = self.engine.engine
        tokenizer = engine.tokenizer
        if tokenizer is None:
            return str
        ids = engine.encode(prompt)
        return lambda response: decode_response(tokenizer, ids, response)

    @property
    def alive(self) -> bool:
        """Whether the engine takes requests on."""
        return self.engine.alive

    def check_model(self, name: str | None) -> None:
        """Refusal: a body wants another model."""
        if name is not None and name != self.settings.name:
            raise Refusal(
                404,
                f"the model {name!r:.200} is not served; allowed: {self.settings.name}",
                param="model",
                code="model_not_found",
            )

    def params(self, fields: SearchFields) -> SearchParams:
        """What a body asks for. InvalidRequest or Refusal: it may not be had."""
        limits = self.settings.limits
        params = fields.params(self.defaults, limits.tokens)
        if params.rows > limits.candidates:
            raise Refusal(
                400,
                f"a round has {params.rows} candidates; allowed: {limits.candidates}",
                param="n" if params.method in ("sample", "fusion", "dynamic_fusion") else None,
            )
        return params

    def check_prompts(self, count: int) -> None:
        """Refusal: too many."""
        if not 1 <= count <= self.settings.limits.prompts:
            raise Refusal(
                400,
                f"{count} prompts in one body; allowed: 1 to {self.settings.limits.prompts}",
                param="prompt",
            )

    async def within_time(self, work: Awaitable[T]) -> T:
        """What ``work`` finds; Refusal after the time that a request may take."""
        seconds = self.settings.limits.seconds
        try:
            return await asyncio.wait_for(work, seconds)
        except asyncio.TimeoutError:
            raise _too_long(seconds) from None

    async def search(self, prompt: Prompt, params: SearchParams) -> SearchResult:
        with self.metrics.request() as watched, self._span(params) as span:
            if span.records:  # then somebody wants to see its rounds
                async with aclosing(self.engine.watch(prompt, params)) as told:  # type: ignore[type-var]
                    async for each in told:
                        if isinstance(each, Round):
                            span.round(each)
                        elif each.result is not None:
                            result = each.result
            else:
                result = await self.engine.generate(prompt, params)
            watched.ended(result)
            span.ended(result)
            self._tell(prompt, result)
            return result

    def _tell(self, prompt: Prompt, result: SearchResult) -> None:
        """A line in the log: texts are in it only where that was asked for."""
        fields: dict[str, Any] = {
            "request_id": REQUEST_ID.get(),
            "finish_reason": result.finish_reason,
            **asdict(result.usage),
        }
        if self.settings.log_text:
            given = prompt.messages if isinstance(prompt, Chat) else prompt
            fields |= {"prompt": given, "texts": [h.text for h in result.hypotheses]}
        log.info("answer", extra=fields)

    def _span(self, params: SearchParams) -> AbstractContextManager[RequestSpan]:
        return request_span(self.settings.name, params)

    async def search_all(
        self, prompts: Sequence[Prompt], params: Sequence[SearchParams]
    ) -> list[SearchResult]:
        """All at the same time; of one that fails the error, and the others are given up."""
        tasks = [asyncio.ensure_future(self.search(*pair)) for pair in zip(prompts, params)]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def stream(self, prompt: Prompt, params: SearchParams) -> AsyncIterator[StreamPiece]:
        """Pieces as they become certain. Refusal after the time that a request may take."""
        async with aclosing(self._told(prompt, params)) as told:  # type: ignore[type-var]
            async for piece in told:
                if isinstance(piece, StreamPiece):
                    yield piece

    async def watch(
        self, prompt: Prompt, params: SearchParams
    ) -> AsyncIterator[StreamPiece | Round]:
        """The same, and rounds as they end."""
        told = self._told(prompt, params, rounds=True)
        async with aclosing(told) as own:  # type: ignore[type-var]
            async for each in own:
                yield each

    async def _told(
        self, prompt: Prompt, params: SearchParams, *, rounds: bool = False
    ) -> AsyncIterator[StreamPiece | Round]:
        seconds = self.settings.limits.seconds
        with self.metrics.request() as watched, self._span(params) as span:
            ask = self.engine.watch if rounds or span.records else self.engine.stream
            deadline = asyncio.get_running_loop().time() + seconds
            async with aclosing(ask(prompt, params)) as pieces:  # type: ignore[type-var]
                while True:
                    left = deadline - asyncio.get_running_loop().time()
                    try:
                        piece = await asyncio.wait_for(anext(pieces), max(0.0, left))
                    except StopAsyncIteration:
                        return
                    except asyncio.TimeoutError:
                        raise _too_long(seconds) from None
                    if isinstance(piece, StreamPiece):
                        watched.piece(len(piece.token_ids))
                        if piece.result is not None:
                            watched.ended(piece.result)
                            span.ended(piece.result)
                            self._tell(prompt, piece.result)
                    else:
                        span.round(piece)
                    yield piece

    async def beside(self, work: Callable[[], T]) -> T:
        """What blocks runs in a thread; it takes its turn between two steps of the searches."""
        return await anyio.to_thread.run_sync(work)


def _too_long(seconds: float) -> Refusal:
    return Refusal(
        504, f"the request took more than {seconds:g} s and was given up", code="timeout"
    )
