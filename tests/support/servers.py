"""A real server over real sockets, in a thread of the test's process."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from fastapi import FastAPI

from w2s_fast import Engine, SearchParams
from w2s_fast.serve import Limits, ServerSettings, build_app
from w2s_fast.serve.service import Service


@dataclass
class Running:
    """A server that listens.

    Attributes:
        loop: its own; state of the service belongs to it.
    """

    url: str
    app: FastAPI
    engine: Engine
    loop: asyncio.AbstractEventLoop

    @property
    def service(self) -> Service:
        found: Service = self.app.state.service
        return found


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = threading.Event()
        self.loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: Any = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self.up.set()


@contextmanager
def running(
    engine: Engine,
    defaults: SearchParams | None = None,
    *,
    name: str = "tiny",
    **settings: Any,
) -> Iterator[Running]:
    """``settings``: of :class:`ServerSettings`; those of :class:`Limits` by their names."""
    limits = {key: settings.pop(key) for key in list(settings) if key in Limits.model_fields}
    app = build_app(
        engine, ServerSettings(name=name, limits=Limits(**limits), **settings), defaults
    )
    with listening(app) as (url, loop):
        yield Running(url, app, engine, loop)


@contextmanager
def listening(app: FastAPI) -> Iterator[tuple[str, asyncio.AbstractEventLoop]]:
    """Where an application listens, and the loop that it runs in."""
    door = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=1)
    server = _Server(config)
    thread = threading.Thread(target=server.run, args=([door],))
    thread.start()
    try:
        assert server.up.wait(30) and server.loop is not None
        yield f"http://127.0.0.1:{door.getsockname()[1]}", server.loop
    finally:
        server.should_exit = True
        thread.join()
        door.close()
