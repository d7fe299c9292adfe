"""Tasks of one event loop on an AsyncEngine, and what its tests share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from tests.support.engines import LONG
from w2s_fast import AsyncEngine, StreamPiece

T = TypeVar("T")
PATIENCE = 60  # seconds; only a broken engine needs them


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """In a loop of its own, and not for ever."""

    async def bounded() -> T:
        return await asyncio.wait_for(coroutine, PATIENCE)

    return asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def read(a: AsyncEngine, *args: Any, **options: Any) -> list[StreamPiece]:
    return [piece async for piece in a.stream(*args, **options)]


async def last(a: AsyncEngine, prompt: list[int]) -> StreamPiece:
    """The piece that has the result."""
    return (await read(a, prompt, LONG))[-1]
