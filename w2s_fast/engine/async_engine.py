"""AsyncEngine: an Engine behind asyncio. One thread takes the steps, any task may ask."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any

from w2s_fast._pages import Hold
from w2s_fast.engine.engine import Engine
from w2s_fast.engine.stream import StreamPiece
from w2s_fast.errors import Aborted, EngineFailure, W2SFastError
from w2s_fast.models import ModelSource
from w2s_fast.params import SearchParams
from w2s_fast.result import Round, SearchResult
from w2s_fast.search import Guide, Request
from w2s_fast.stats import EngineStats
from w2s_fast.text import Prompt


class AsyncEngine:
    """Weak-to-strong search for many callers at once.

    Example::

        async with AsyncEngine(base="gpt2-xl", guides=Guide("gpt2-imdb", "gpt2")) as engine:
            result = await engine.generate("The film begins")
            async for piece in engine.stream("The film begins"):
                print(piece.text, end="")

    A request enters at the next step of the running ones, and its result does not depend on them.
    A task that is cancelled, or a stream that is closed, gives its request up: its pages are free
    within a round. Tasks may belong to several event loops, and the :class:`Engine` may be used
    directly at the same time. The engine's thread runs until :meth:`close`.

    Args:
        base: an :class:`Engine`, or what one is made of, together with ``guides`` and ``options``.

    Where the base is divided among several ranks, rank 0 has it, and leads the others until it is
    closed: see :meth:`Engine.follow`.

    Raises:
        InvalidRequest: this is another rank than the first, or it leads already.
        EngineFailure: the :class:`Engine` was made before ``os.fork``, by the parent.
    """

    def __init__(
        self,
        base: Engine | ModelSource,
        guides: Guide | Sequence[Guide] | None = None,
        **options: Any,
    ) -> None:
        self.engine = base if isinstance(base, Engine) else Engine(base, guides, **options)
        self._runner = self.engine.runner
        self._runner.process.check()
        self._leads = ExitStack()
        self._leads.enter_context(self.engine.lead())
        self._lock = threading.Lock()  # guards what follows
        self._callers: set[_Caller] = set()  # of requests that have not ended
        self._end: W2SFastError | None = None  # why nothing more is taken on
        self._work = threading.Event()
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
            EngineFailure: its thread has ended, or belongs to the parent of this process.
        """
        caller = await self._submit(prompt, params, priority, streams=False)
        try:
            while not caller.over:
                await caller.news()
            return self._result(caller)
        finally:
            self._leave(caller)

    async def stream(
        self, prompt: Prompt, params: SearchParams | None = None, *, priority: int = 0
    ) -> AsyncIterator[StreamPiece]:
        """The response as it becomes certain; see :meth:`Engine.stream`.

        A task that falls behind gets fewer and longer pieces.
        """
        caller = await self._submit(prompt, params, priority, streams=True)
        try:
            pieces = self.engine.pieces(caller.request)
            while not caller.over:
                await caller.news()
                piece = pieces.next(caller.request.agreed)
                if piece is not None:
                    yield piece
            yield pieces.last(self._result(caller))
        finally:
            self._leave(caller)

    async def watch(
        self, prompt: Prompt, params: SearchParams | None = None, *, priority: int = 0
    ) -> AsyncIterator[StreamPiece | Round]:
        """:meth:`stream`, and between its pieces every round as it ends; the trace is recorded.

        A round comes before the text that it made certain.
        """
        params = replace(params or SearchParams(), trace=True)
        caller = await self._submit(prompt, params, priority, streams=True)
        try:
            pieces = self.engine.pieces(caller.request)
            while not caller.over:
                await caller.news()
                for each in caller.new_rounds():
                    yield each
                piece = pieces.next(caller.request.agreed)
                if piece is not None:
                    yield piece
            result = self._result(caller)
            for each in caller.new_rounds():
                yield each
            yield pieces.last(result)
        finally:
            self._leave(caller)

    @property
    def alive(self) -> bool:
        """Whether requests are taken on: it was not closed, its thread has not ended, and of
        several ranks none has died."""
        return self._end is None and self._thread.is_alive() and self._runner.together

    def weights_changed(self) -> None:
        """See :meth:`Engine.weights_changed`."""
        self.engine.weights_changed()

    def stats(self) -> EngineStats:
        """See :meth:`Engine.stats`."""
        return self.engine.stats()

    async def close(self) -> None:
        """Give up what is under way here, with :class:`Aborted`, and end the thread.

        Requests that others have submitted to the same :class:`Engine` go on. In a child by
        ``os.fork`` there is nothing to end.
        """
        if not self._runner.process.is_here:
            return
        with Hold(self._lock):
            self._end = self._end or Aborted("the engine was closed")
        self._work.set()
        self._runner.wake()
        try:
            await asyncio.to_thread(self._thread.join)
        except RuntimeError:  # no thread is lent any more: the interpreter is shutting down
            self._thread.join()
        self._leads.close()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _submit(
        self, prompt: Prompt, params: SearchParams | None, priority: int, *, streams: bool
    ) -> _Caller:
        self._runner.process.check()
        # Long prompts take a while to tokenise: not in the loop's own thread.
        encode = partial(self.engine.make_request, prompt, params or SearchParams(), priority)
        try:
            encoding = asyncio.get_running_loop().run_in_executor(None, encode)
        except RuntimeError as error:  # the interpreter, or the loop, is shutting down
            raise EngineFailure(f"nothing more is taken on: {error}") from error
        request = await encoding
        request.streams = streams
        caller = _Caller(request)
        request.listener = caller.listen
        with Hold(self._lock):  # so that nobody comes in after the thread's last look
            if self._end is not None:
                raise _again(self._end)
            if not self._thread.is_alive():
                raise EngineFailure("the engine's thread has ended; make a new AsyncEngine")
            self._callers.add(caller)
            self._runner.submit(request)
        self._work.set()
        return caller

    def _result(self, caller: _Caller) -> SearchResult:
        if caller.failure is not None and not caller.request.ended:
            raise caller.failure
        result = self.engine.result(caller.request)
        if result.error is not None:
            raise result.error
        return result

    def _leave(self, caller: _Caller) -> None:
        """Nobody waits for this request any longer."""
        if not self._runner.process.is_here:
            return  # a copy of the parent's task; the lock may be a copy of a locked one
        with Hold(self._lock):
            self._callers.discard(caller)
        if not caller.over:
            self._runner.give_up(caller.request)
            self._runner.settle()

    def _run(self) -> None:
        end: W2SFastError | None = None
        try:
            while self._end is None:
                self._work.wait()
                self._work.clear()
                while not self._idle():
                    self._runner.advance((), unless=self._idle)
        except BaseException as error:  # nobody may wait for a thread that is no more
            end = EngineFailure(f"the engine's thread ended: {type(error).__name__}: {error}")
            end.__cause__ = error
        finally:
            with Hold(self._lock):
                self._end = end = end or self._end
                callers = list(self._callers)
            assert end is not None
            for caller in callers:
                failure = _again(end)
                self._runner.give_up(caller.request, failure)
                caller.fail(failure)
            self._runner.settle()

    def _idle(self) -> bool:
        return self._end is not None or not self._under_way()

    def _under_way(self) -> bool:
        with Hold(self._lock):
            return any(not caller.request.ended for caller in self._callers)


class _Caller:
    """A task that waits for its request."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.failure: W2SFastError | None = None  # the engine's end, before that of the request
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._told = 0  # tokens
        # Rounds are read by the thread that takes the steps, between two of them.
        self._rounds: deque[Round] = deque()
        self._seen = 0  # rounds

    @property
    def over(self) -> bool:
        """Whether there is nothing to wait for."""
        return self.request.ended or self.failure is not None

    async def news(self) -> None:
        """Wait until there is more, or it is over."""
        await self._news.wait()
        self._news.clear()  # first, so that what comes while the task looks is not missed

    def listen(self) -> None:
        """The request's listener: in whatever thread took the step.

        RuntimeError if the task's loop was closed: nobody is left who waits.
        """
        rounds = self.request.rounds(self._seen) if self.request.params.trace else []
        self._seen += len(rounds)
        self._rounds.extend(rounds)
        if self.request.ended or rounds or len(self.request.agreed) > self._told:
            self._told = len(self.request.agreed)
            self._loop.call_soon_threadsafe(self._news.set)

    def new_rounds(self) -> Iterator[Round]:
        """Those that have ended and were not told yet, of a request with a trace."""
        while self._rounds:
            yield self._rounds.popleft()

    def fail(self, failure: W2SFastError) -> None:
        """There will be no more news of the request."""
        self.failure = failure
        with suppress(RuntimeError):  # its loop was closed
            self._loop.call_soon_threadsafe(self._news.set)


def _again(error: W2SFastError) -> W2SFastError:
    """A copy to raise: a raised error belongs to whoever catches it."""
    copy = type(error)(*error.args)
    copy.__cause__ = error.__cause__
    return copy
