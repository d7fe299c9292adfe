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
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from hashlib import blake2b
from typing import Any, TypeVar

import openai

from w2s_fast.errors import RemoteFailure, W2SFastError
from w2s_fast.remote.base import RemoteBase
from w2s_fast.remote.dialect import CHAT, COMPLETIONS, OPTIONAL, Body, usage_of
from w2s_fast.remote.drawing import Ask, Drawing, Given
from w2s_fast.remote.failures import Answered
from w2s_fast.remote.prompt import RemotePrompt
from w2s_fast.remote.sending import Spent, connections, counted
from w2s_fast.remote.trial import find_dialect, only_model, told
from w2s_fast.result import Sample

_T = TypeVar("_T")
_CONNECT_SECONDS = 10.0
_TRIAL_RETRIES = 1
# Seconds between tries that were answered without any sample, which nobody else counts as failed.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
# Answers in a row that had fewer samples than were asked for, until no more are asked for at once.
_SHORT_ANSWERS = 2


class Client:
    """One server. Drawings of all searches share ``max_concurrency``."""

    def __init__(self, base: RemoteBase) -> None:
        """RemoteFailure: the server cannot be used."""
        self._base = base
        self._where = f"{base.url} (model {base.model})" if base.model else base.url
        self._openai = openai.AsyncOpenAI(
            base_url=base.url,
            api_key="none",
            max_retries=base.max_retries,
            timeout=openai.Timeout(base.timeout, connect=min(base.timeout, _CONNECT_SECONDS)),
            http_client=connections(base),
        )
        self._at_once = asyncio.Semaphore(base.max_concurrency)
        self._most_samples: int | None = None  # in an answer, as far as is known
        self._short_answers = self._short_of = 0
        self._said_instead = ""
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
        try:
            drawing.fill(await _together(self._given(prompt, ask) for ask in drawing.asks))
        except W2SFastError as error:
            drawing.fill(error=error)
        except Exception as error:
            drawing.fill(error=self._answered(error).failure(self._where, "samples"))
        told()

    async def _given(self, prompt: RemotePrompt, ask: Ask) -> Given:
        """As many samples as were asked for, from as many requests as that takes."""
        wanted = 1 if prompt.greedy else ask.samples
        copies = ask.samples if prompt.greedy else 1
        # Of each request how many samples it asks for, its seed, and what came: None, no answer.
        counts: list[int] = []
        came: list[list[Sample] | None] = []
        in_vain = 0
        while (missing := wanted - sum(len(own or ()) for own in came)) > 0:
            if None not in came:
                counts += self._parts(missing, in_vain)
                came += [None] * (len(counts) - len(came))
            # Asked again with the same seed, what was not answered is what it would have been.
            unanswered = [i for i, own in enumerate(came) if own is None]
            found = await _together(
                self._ask(prompt, ask, counts[i], _seed(ask.seed, i)) for i in unanswered
            )
            for i, own in zip(unanswered, found):
                came[i] = [] if isinstance(own, str) else own
            if ended := next((own for own in found if isinstance(own, str)), None):
                return Given(_first(came, wanted) * copies, ended)
            in_vain = 0 if any(found) else in_vain + 1
            if in_vain > self._base.max_retries:
                raise RemoteFailure(
                    f"{self._where}: {ask.samples} samples of {ask.max_tokens} tokens: it answers "
                    f"without any, {in_vain} times{self._instead}; check that it is such a server, "
                    "and its log"
                )
            if in_vain:
                await asyncio.sleep(min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** (in_vain - 1)))
        return Given(_first(came, wanted) * copies)

    def _parts(self, wanted: int, in_vain: int) -> list[int]:
        """How many samples each request asks for."""
        most = 1 if in_vain else self._most_samples or wanted
        return [min(most, wanted - i) for i in range(0, wanted, most)]

    async def _ask(
        self, prompt: RemotePrompt, ask: Ask, count: int, seed: int
    ) -> list[Sample] | str | None:
        """Samples, ``count`` at most; why none can come; or None where no answer did."""
        account = prompt.account
        route = self._dialect.route_of(prompt)
        body = self._dialect.body(prompt, ask.behind)
        body[self._dialect.length_of(route)] = ask.max_tokens
        if count > 1:
            body["n"] = count
        if "seed" in self._dialect.optional:
            body["seed"] = seed
        async with self._at_once:
            room = account.reserve(count, ask.max_tokens)
            if isinstance(room, str):
                return room
            samples, used = list[Sample](), (0, 0, 0)
            try:
                with counted(partial(account.send, room)):
                    answer = await self._post(self._openai, route, body)
                samples = self._dialect.samples(prompt, ask.behind, answer, ask.max_tokens)
                used = usage_of(answer, samples)
            except json.JSONDecodeError:  # it was cut off on its way
                return None
            except ValueError:  # an answer to something else; some say there what went wrong
                said = answer.get("error") or ""
                self._said_instead = str(said.get("message") if isinstance(said, dict) else said)
            except Spent:
                return account.spent
            except openai.OpenAIError as error:
                answered = self._answered(error)
                if answered.context_is_full:
                    return "the context of the model is full"
                asked = f"{count} samples of {ask.max_tokens} tokens by {route}"
                raise answered.failure(self._where, asked) from None
            finally:
                read, cached, sampled = used
                account.settle(room, prompt=read, cached=cached, completion=sampled)
        self._learn(count, len(samples))
        return samples[:count]

    @property
    def _instead(self) -> str:
        """What it said last in the place of samples."""
        said = self._answered(RuntimeError(self._said_instead)).said
        return f" ({said.removeprefix('RuntimeError: ')})" if self._said_instead else ""

    def _answered(self, error: Exception) -> Answered:
        return Answered(error, self._base.secrets)

    async def _post(self, client: openai.AsyncOpenAI, route: str, body: Body) -> Any:
        """The answer. JSONDecodeError: it is none."""
        body = {**body, **self._base.extra_body}
        # Servers have more fields than the client's methods know.
        raw: Any
        if route == COMPLETIONS:
            ask = client.completions.with_raw_response.create
            raw = await ask(model=self.model, prompt=body.pop("prompt"), extra_body=body)
        else:
            tell = client.chat.completions.with_raw_response.create
            raw = await tell(model=self.model, messages=body.pop("messages"), extra_body=body)
        answer = json.loads(raw.content)
        return answer if isinstance(answer, dict) else {}

    def _learn(self, asked: int, came: int) -> None:
        """How many samples an answer has at most."""
        if not came:
            return
        if came >= asked:
            if asked > self._short_of:  # it has more than it had
                self._short_answers = 0
            return
        self._short_answers, self._short_of = self._short_answers + 1, came
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

        retries = min(self._base.max_retries, _TRIAL_RETRIES)
        client = self._openai.with_options(max_retries=retries)

        async def send(route: str, body: Body) -> Any:
            return await self._post(client, route, body)

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
            raise self._answered(error).failure(self._where, "its models") from None


async def _together(works: Iterable[Coroutine[Any, Any, _T]]) -> list[_T]:
    """What they give. Where one fails, or nobody waits any longer, the others end, too."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _first(came: Sequence[list[Sample] | None], wanted: int) -> list[Sample]:
    return [sample for own in came for sample in own or ()][:wanted]


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
