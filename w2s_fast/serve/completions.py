"""``/v1/completions``: text goes on, as OpenAI's clients and lm-evaluation-harness ask for it."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from pydantic import Field

from w2s_fast.engine import StreamPiece
from w2s_fast.params import SearchParams
from w2s_fast.result import Hypothesis, SearchResult, TokenLogProbs, Usage
from w2s_fast.serve.refusals import Refusal, as_refusal
from w2s_fast.serve.search_fields import SearchFields
from w2s_fast.serve.service import Service
from w2s_fast.serve.streams import event
from w2s_fast.serve.token_texts import TokenTexts

MOST_LOGPROBS = 20
FINISH = {"eos": "stop", "stop": "stop", "length": "length"}
Prompts = str | list[str] | list[int] | list[list[int]]


class CompletionBody(SearchFields):
    """What is to be continued, and how."""

    model: str | None = None
    prompt: Prompts
    stream: bool | None = None
    stream_options: dict[Literal["include_usage", "continuous_usage_stats"], bool] | None = None
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)


@dataclass(frozen=True)
class Job:
    """A body, checked."""

    body: CompletionBody
    prompts: list[str | list[int]]
    params: SearchParams
    id: str
    created: int
    model: str

    def params_of(self, i: int) -> SearchParams:
        """Of one of the prompts. A seed that was asked for is everyone's, so that each is answered
        as it would be alone; else equal prompts have different answers."""
        asked = self.body.seed is not None
        return self.params if asked else replace(self.params, seed=self.params.seed + i)

    @property
    def grows(self) -> bool:
        """Whether anything is to be written at all."""
        most = self.body.max_completion_tokens
        return (most if self.body.max_tokens is None else self.body.max_tokens) != 0

    def head(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
        }


def job_of(service: Service, body: CompletionBody) -> Job:
    """Refusal or InvalidRequest, before anything runs."""
    service.check_model(body.model)
    prompts = _listed(body.prompt)
    service.check_prompts(len(prompts))
    if body.stream and (body.echo or body.logprobs is not None):
        raise Refusal(
            400,
            "a stream carries text that is certain, and neither echo nor logprobs; allowed: one of "
            "them without stream",
            param="stream",
        )
    params = service.params(body)
    name = service.settings.name
    return Job(body, prompts, params, f"cmpl-{uuid.uuid4().hex}", int(time.time()), name)


def _listed(prompt: Prompts) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if prompt and all(isinstance(part, int) for part in prompt):
        return [prompt]  # type: ignore[list-item]
    return list(prompt)  # type: ignore[arg-type]


async def complete(service: Service, job: Job) -> dict[str, Any]:
    """The whole answer; prompts in their order, and of each its hypotheses, best first."""
    if job.grows:
        params = [job.params_of(i) for i in range(len(job.prompts))]
        results = await service.search_all(job.prompts, params)
    else:
        results = [_nothing(len(ids)) for ids in await _ids_of(service, job.prompts)]
    told = await _logprobs(service, job, results)
    choices: list[dict[str, Any]] = []
    for prompt, result, logprobs in zip(job.prompts, results, told):
        for hypothesis, own in zip(result.hypotheses, logprobs):
            choices.append(_choice(service, job, prompt, hypothesis, own, len(choices)))
    return {
        **job.head(),
        "choices": choices,
        "usage": usage_of(results),
        "w2s": searched(job.params, results),
    }


def _nothing(prompt_tokens: int) -> SearchResult:
    """Of ``max_tokens`` 0."""
    empty = Hypothesis("", [], None, "length", [], [])
    return SearchResult([empty], Usage(prompt_tokens, 0, 0, 0))


async def _ids_of(service: Service, prompts: Sequence[str | list[int]]) -> list[list[int]]:
    engine = service.engine.engine
    return await service.beside(lambda: [engine.encode(prompt) for prompt in prompts])


async def _logprobs(
    service: Service, job: Job, results: Sequence[SearchResult]
) -> list[list[tuple[int, TokenLogProbs] | None]]:
    """Of each hypothesis what the base says of it behind its prompt, and how long that one is."""
    wanted = job.body.logprobs
    if wanted is None:
        return [[None] * len(result.hypotheses) for result in results]
    prompts = await _ids_of(service, job.prompts)
    texts = [
        prompt + hypothesis.token_ids
        for prompt, result in zip(prompts, results)
        for hypothesis in result.hypotheses
    ]
    engine = service.engine.engine
    told = iter(await service.beside(lambda: engine.log_probs(texts, top=wanted)))
    return [
        [(len(prompt), next(told)) for _ in r.hypotheses] for prompt, r in zip(prompts, results)
    ]


def _choice(
    service: Service,
    job: Job,
    prompt: str | list[int],
    hypothesis: Hypothesis,
    told: tuple[int, TokenLogProbs] | None,
    index: int,
) -> dict[str, Any]:
    text = hypothesis.text or ""
    if job.body.echo:
        before = prompt if isinstance(prompt, str) else service.decode(prompt)
        text = before + text
    logprobs = None
    if told is not None:
        length, values = told
        first = 0 if job.body.echo else length
        logprobs = _rendered(TokenTexts(service.tokenizer, values.token_ids), values, first)
    return {
        "index": index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": FINISH[hypothesis.finish_reason],
        "stop_reason": hypothesis.stop_reason,
        "score": hypothesis.score,
    }


def _rendered(texts: TokenTexts, told: TokenLogProbs, first: int) -> dict[str, Any]:
    """As OpenAI's completions have it: the text's own token is among the likeliest, too."""
    places = range(first, len(told.token_ids))
    tops: list[dict[str, float] | None] = []
    for place in places:
        top, own = told.top[place], told.logprobs[place]
        if top is None or own is None:
            tops.append(None)
            continue
        named: dict[str, float] = {}
        for token, value in ({told.token_ids[place]: own} | top).items():
            shown = texts.text(place, token)
            named[texts.name(token) if shown in named else shown] = value
        tops.append(named)
    return {
        "tokens": texts.texts(places),
        "token_logprobs": told.logprobs[first:],
        "top_logprobs": tops,
        "text_offset": texts.offsets(places, 0),
    }


def usage_of(results: Sequence[SearchResult]) -> dict[str, Any]:
    prompt = sum(result.usage.prompt_tokens for result in results)
    answer = sum(result.usage.completion_tokens for result in results)
    cached = sum(result.stats.cached_tokens for result in results if result.stats)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def searched(params: SearchParams, results: Sequence[SearchResult]) -> dict[str, Any]:
    """What the search adds to an answer."""
    found: dict[str, Any] = {
        "seed": params.seed,
        "sampled_tokens": sum(result.usage.sampled_tokens for result in results),
        "scored_tokens": sum(result.usage.scored_tokens for result in results),
        "rounds": sum(result.stats.rounds for result in results if result.stats),
    }
    if params.trace:
        found["traces"] = [result.trace and asdict(result.trace) for result in results]
    return found


async def stream(service: Service, job: Job) -> AsyncIterator[bytes]:
    """Server-sent events. Of several hypotheses the best one grows, and the others come whole."""
    per_prompt = job.params.n
    pieces: asyncio.Queue[tuple[int, StreamPiece | Exception | None]] = asyncio.Queue(maxsize=1)

    async def read(i: int, prompt: str | list[int]) -> None:
        try:
            told = service.stream(prompt, job.params_of(i))
            async with aclosing(told) as own:  # type: ignore[type-var]
                async for piece in own:
                    await pieces.put((i, piece))
            await pieces.put((i, None))
        except Exception as error:  # told the client
            await pieces.put((i, error))

    def chunk(index: int, text: str, hypothesis: Hypothesis | None = None) -> bytes:
        reason = None if hypothesis is None else FINISH[hypothesis.finish_reason]
        choice: dict[str, Any] = {"index": index, "text": text, "logprobs": None}
        choice["finish_reason"] = reason
        if hypothesis is not None:
            choice |= {"stop_reason": hypothesis.stop_reason, "score": hypothesis.score}
        return event({**job.head(), "choices": [choice]})

    tasks = [asyncio.ensure_future(read(i, prompt)) for i, prompt in enumerate(job.prompts)]
    try:
        results: list[SearchResult] = []
        open_ones, begun = len(tasks), False
        while open_ones:
            i, piece = await pieces.get()
            if piece is None:
                open_ones -= 1
            elif isinstance(piece, Exception):
                if not begun:  # there is still a status to say it with
                    raise piece
                yield event(as_refusal(piece).body)
                return
            elif piece.result is None:
                if piece.text:
                    begun = True
                    yield chunk(i * per_prompt, piece.text)
            else:
                results.append(piece.result)
                begun = True
                best, *others = piece.result.hypotheses
                yield chunk(i * per_prompt, piece.text or "", best)
                for j, other in enumerate(others, 1):
                    yield chunk(i * per_prompt + j, other.text or "", other)
        if (job.body.stream_options or {}).get("include_usage"):
            more = {"usage": usage_of(results), "w2s": searched(job.params, results)}
            yield event({**job.head(), "choices": [], **more})
        yield event("[DONE]")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
