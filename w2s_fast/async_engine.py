"""AsyncEngine: an Engine behind asyncio. One thread takes the steps, any task may ask."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Any

from w2s_fast.engine import Engine
from w2s_fast.errors import Aborted, W2SFastError
from w2s_fast.guide import Guide
from w2s_fast.load import ModelSource
from w2s_fast.params import SearchParams
from w2s_fast.prompt import Prompt
from w2s_fast.request import Request
from w2s_fast.result import SearchResult
from w2s_fast.stats import EngineStats
from w2s_fast.stream import StreamPiece


class AsyncEngine:
    """Weak-to-strong search for many callers at once.

    Example::

        async with AsyncEngine(base="gpt2-xl", guides=Guide("gpt2-imdb", "gpt2")) as engine:
            result = await engine.generate("The film begins")
            async for piece in engine.stream("The film begins"):
                print(piece.text, end="")

    A request enters at the next step of the running ones, and its result does not depend on them.
    A task that is cancelled, or a stream that is left, gives its request up: its pages are free
    within a round.

    Args:
        base: an :class:`Engine`, or what one is made of, together with ``guides`` and ``options``.
    """

    def __init__(
        self,
        base: Engine | ModelSource,
        guides: Guide | Sequence[Guide] | None = None,
        **options: Any,
    ) -> None:
        self.engine = base if isinstance(base, Engine) else Engine(base, guides, **options)
        self._work = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="w2s-fast engine", daemon=True)
        self._thread.start()

    async def generate(
        self, prompt: Prompt, params: SearchParams | None = None, *, priority: int = 0
    ) -> SearchResult:
        """Search a response for one prompt; see :meth:`Engine.generate`.

        Raises:
            InvalidRequest: the prompt or its parameters are not allowed.
            NumericalError: a model produced NaN or infinity.
            Aborted: the engine was closed.
        """
        async for piece in self.stream(prompt, params, priority=priority):
            if piece.result is not None:
                return piece.result
        raise AssertionError("a stream ends with a result")

    async def stream(
        self, prompt: Prompt, params: SearchParams | None = None, *, priority: int = 0
    ) -> AsyncIterator[StreamPiece]:
        """The response as it becomes certain; see :meth:`Engine.stream`."""
        # Long prompts take a while to tokenise: not in the loop's own thread.
        request = await asyncio.to_thread(
            self.engine.make_request, prompt, params or SearchParams(), priority
        )
        pieces: asyncio.Queue[StreamPiece | W2SFastError] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def put(item: StreamPiece | W2SFastError) -> None:
            # A loop that has been closed has nobody left who could read.
            if not loop.is_closed():
                loop.call_soon_threadsafe(pieces.put_nowait, item)

        request.listener = self._listener(request, put)
        self._submit(request)
        try:
            while True:
                item = await pieces.get()
                if isinstance(item, W2SFastError):
                    raise item
                yield item
                if item.result is not None:
                    return
        finally:
            if not request.ended:
                self.engine.runner.give_up(request)
                self._work.set()

    def stats(self) -> EngineStats:
        """See :meth:`Engine.stats`."""
        return self.engine.stats()

    async def close(self) -> None:
        """Give up what is under way, and end the thread."""
        self._closed = True
        self._work.set()
        await asyncio.to_thread(self._thread.join)

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def _submit(self, request: Request) -> None:
        if self._closed:
            raise Aborted("the engine is closed")
        self.engine.runner.submit(request)
        self._work.set()

    def _listener(
        self, request: Request, put: Callable[[StreamPiece | W2SFastError], None]
    ) -> Callable[[], None]:
        agreement = self.engine.agreement(request)

        def listen() -> None:
            if not request.ended:
                piece = agreement.grow()
                if piece is not None:
                    put(piece)
            elif request.error is not None:
                put(request.error)
            else:
                put(agreement.finish(self.engine.result(request)))

        return listen

    def _run(self) -> None:
        runner = self.engine.runner
        while not self._closed:
            self._work.wait()
            self._work.clear()
            while not self._closed and not runner.idle:
                runner.step()
        runner.give_up_all()
