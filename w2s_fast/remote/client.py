"""Client: asks a server for samples, in a thread of its own with one pool of connections.

Tries are made again by the openai client: what came of one that failed counts for nothing, so that
no sample is lost or counted twice. Where fewer samples come than were asked for, the rest is.
"""

from __future__ import annotations

import asyncio
import json
import threading
import warnings
import weakref
from collections.abc import Callable, Collection
from concurrent.futures import Future
from functools import partial
from hashlib import blake2b
from typing import Any

import openai

from w2s_fast.errors import RemoteFailure, W2SFastError
from w2s_fast.remote.base import RemoteBase
from w2s_fast.remote.dialect import CHAT, COMPLETIONS, OPTIONAL, Body, usage_of
from w2s_fast.remote.drawing import Ask, Drawing, Given
from w2s_fast.remote.failures import Answered
from w2s_fast.remote.prompt import RemotePrompt
from w2s_fast.remote.trial import find_dialect, only_model, told
from w2s_fast.result import Sample

_CONNECT_SECONDS = 10.0
_TRIAL_RETRIES = 1
# Answers in a row that had fewer samples than were asked for, until no more are asked for at once.
_SHORT_ANSWERS = 2


class Client:
    """One server. Drawings of all searches share ``max_concurrency``."""

    def __init__(self, base: RemoteBase) -> None:
        """RemoteFailure: the server cannot be used."""
        self._base = base
        self._where = f"{base.url} (model {base.model})" if base.model else base.url
        # The key of another service is none of this server's business.
        self._openai = openai.AsyncOpenAI(
            base_url=base.url,
            api_key=base.api_key or "EMPTY",  # what servers without keys are told, mostly
            organization="",
            project="",
            max_retries=base.max_retries,
            timeout=openai.Timeout(base.timeout, connect=min(base.timeout, _CONNECT_SECONDS)),
            default_headers=_headers(base),
        )
        self._at_once = asyncio.Semaphore(base.max_concurrency)
        self._most_samples: int | None = None  # in an answer, as far as is known
        self._short_answers = 0
        self._under_way: dict[Drawing, Future[None]] = {}
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(
            target=_serve, args=(self._loop, self._openai), name="w2s-fast remote", daemon=True
        )
        thread.start()
        weakref.finalize(self, _stop, self._loop)
        self.model, self._dialect, self._refused = asyncio.run_coroutine_threadsafe(
            self._look(), self._loop
        ).result()
        self._where = f"{base.url} (model {self.model})"

    @property
    def about(self) -> str:
        return f"{self._where}: {told(self._dialect)}"

    def accepts(self, prompt: object) -> str | None:
        if isinstance(prompt, str) or self._dialect.messages:
            return None
        answered = self._refused.get(CHAT)
        why = "" if answered is None else f": {answered.said}"
        return f"{self._where} takes no chats{why}; give the prompt as a string"

    def lacks(self, names: Collection[str]) -> set[str]:
        missing: frozenset[str] = OPTIONAL - self._dialect.optional
        return set(names).intersection(missing)

    def draw(self, prompt: RemotePrompt, drawing: Drawing, told: Callable[[], None]) -> None:
        work = self._fill(prompt, drawing, told)
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        drawing.begin(future.cancel)
        self._under_way[drawing] = future
        future.add_done_callback(partial(_forget, self._under_way, drawing))

    def keep_only(self, drawings: Collection[Drawing]) -> None:
        for drawing in set(self._under_way) - set(drawings):
            drawing.cancel()

    async def _fill(self, prompt: RemotePrompt, drawing: Drawing, told: Callable[[], None]) -> None:
        tasks = [asyncio.ensure_future(self._given(prompt, ask)) for ask in drawing.asks]
        try:
            drawing.fill(await asyncio.gather(*tasks))
        except W2SFastError as error:
            drawing.fill(error=error)
        except Exception as error:
            drawing.fill(error=Answered(error, self._base.api_key).failure(self._where, "samples"))
        finally:  # of one that failed, or of all where nobody waits any longer
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        told()

    async def _given(self, prompt: RemotePrompt, ask: Ask) -> Given:
        """As many samples as were asked for, from as many requests as that takes."""
        samples: list[Sample] = []
        wanted = 1 if prompt.greedy else ask.samples
        sent = in_vain = 0
        while len(samples) < wanted:
            counts = self._parts(wanted - len(samples), in_vain)
            seeds = [_seed(ask.seed, sent + i) for i in range(len(counts))]
            sent += len(counts)
            found = await asyncio.gather(
                *(self._ask(prompt, ask, *own) for own in zip(counts, seeds))
            )
            came = [sample for own in found if not isinstance(own, str) for sample in own]
            samples += came
            if ended := next((own for own in found if isinstance(own, str)), None):
                return Given(samples[:wanted] * (ask.samples if prompt.greedy else 1), ended)
            in_vain = 0 if came else in_vain + 1
            if in_vain > self._base.max_retries:
                raise RemoteFailure(
                    f"{self._where}: {ask.samples} samples of {ask.max_tokens} tokens: it answers "
                    f"without any, {in_vain} times; check that it is such a server, and its log"
                )
        return Given(samples * ask.samples if prompt.greedy else samples[:wanted])

    def _parts(self, wanted: int, in_vain: int) -> list[int]:
        """How many samples each request asks for."""
        most = 1 if in_vain else self._most_samples or wanted
        return [min(most, wanted - i) for i in range(0, wanted, most)]

    async def _ask(
        self, prompt: RemotePrompt, ask: Ask, count: int, seed: int
    ) -> list[Sample] | str:
        """Samples, ``count`` at most; or why none can come."""
        account = prompt.account
        body = {**self._dialect.body(prompt, ask.behind), self._dialect.length: ask.max_tokens}
        if count > 1:
            body["n"] = count
        if "seed" in self._dialect.optional:
            body["seed"] = seed
        async with self._at_once:
            room = account.reserve(count * ask.max_tokens)
            if isinstance(room, str):
                return room
            retries = min(self._base.max_retries, room.requests - 1)
            requests, samples, used = retries + 1, [], (0, 0, 0)
            try:
                route = self._dialect.route_of(prompt)
                requests, answer = await self._post(route, body, retries)
                samples = self._dialect.samples(prompt, ask.behind, answer, ask.max_tokens)
                used = usage_of(answer, samples)
            except ValueError:  # no answer at all: as one without samples
                pass
            except openai.OpenAIError as error:
                answered = Answered(error, self._base.api_key)
                requests = requests if _was_tried_again(answered) else 1
                if answered.context_is_full:
                    return "the context of the model is full"
                asked = f"{count} samples of {ask.max_tokens} tokens by {route}"
                raise answered.failure(self._where, asked) from None
            finally:
                read, cached, sampled = used
                account.settle(
                    room, requests=requests, prompt=read, cached=cached, completion=sampled
                )
        self._learn(count, len(samples))
        return samples[:count]

    async def _post(self, route: str, body: Body, retries: int) -> tuple[int, Any]:
        """How many requests it took, and the answer. ValueError: it is none."""
        client = self._openai
        if retries != self._base.max_retries:
            client = client.with_options(max_retries=retries)
        body = {**body, **self._base.extra_body}
        # Servers have more fields than the client's methods know.
        raw: Any
        if route == COMPLETIONS:
            ask = client.completions.with_raw_response.create
            raw = await ask(model=self.model, prompt=body.pop("prompt"), extra_body=body)
        else:
            tell = client.chat.completions.with_raw_response.create
            raw = await tell(model=self.model, messages=body.pop("messages"), extra_body=body)
        try:
            answer = json.loads(raw.content)
        except ValueError:
            answer = None
        return raw.retries_taken + 1, answer if isinstance(answer, dict) else {}

    def _learn(self, asked: int, came: int) -> None:
        """How many samples an answer has at most."""
        if came >= asked or not came:
            self._short_answers = 0 if came else self._short_answers
            return
        self._short_answers += 1
        if self._short_answers < _SHORT_ANSWERS:
            return
        first = self._most_samples is None
        self._most_samples = min(came, self._most_samples or came)
        if first:
            warnings.warn(
                f"{self._where} gives {came} of {asked} samples (n): the others are asked for in "
                "further requests",
                stacklevel=2,
            )

    async def _look(self) -> tuple[str, Any, dict[str, Answered]]:
        """Which model there is, and what the server takes. RemoteFailure: it cannot be used."""
        model = self._base.model
        if model is None:
            model = only_model(await self._listed(), self._where)
        self.model = model

        async def send(route: str, body: Body) -> Any:
            return (await self._post(route, body, _TRIAL_RETRIES))[1]

        try:
            dialect, refused = await find_dialect(send, self._base, self._where)
        except RemoteFailure as error:
            if "name a model" not in str(error):
                raise
            listed = ", ".join((await self._listed())[:10])
            raise RemoteFailure(f"{error}; it lists: {listed or 'none'}") from None
        return model, dialect, refused

    async def _listed(self) -> list[str]:
        """Names of models, as far as the server tells."""
        try:
            return [model.id async for model in self._openai.models.list()]
        except openai.OpenAIError as error:
            raise Answered(error, self._base.api_key).failure(self._where, "its models") from None


def _was_tried_again(answered: Answered) -> bool:
    return answered.status is None or answered.status in (408, 409, 429) or answered.status >= 500


def _headers(base: RemoteBase) -> dict[str, Any]:
    headers: dict[str, Any] = {
        "OpenAI-Organization": openai.Omit(),
        "OpenAI-Project": openai.Omit(),
    }
    return {**headers, **base.headers}


def _seed(seed: int, number: int) -> int:
    """Of the so-manieth request for a text: no two ask for the same samples."""
    if number == 0:
        return seed
    digest = blake2b(f"{seed} {number}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") & 0x7FFFFFFF


def _forget(under_way: dict[Drawing, Future[None]], drawing: Drawing, _: object) -> None:
    under_way.pop(drawing, None)


def _serve(loop: asyncio.AbstractEventLoop, client: openai.AsyncOpenAI) -> None:
    asyncio.set_event_loop(loop)
    loop.run_forever()
    loop.run_until_complete(client.close())
    loop.close()


def _stop(loop: asyncio.AbstractEventLoop) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(loop.stop)
