"""The process: listening, its log, and how it stops."""

from __future__ import annotations

import asyncio
import logging
import logging.config
import signal
import socket
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from pythonjsonlogger.core import RESERVED_ATTRS

from w2s_fast.serve.service import Service
from w2s_fast.serve.settings import ServerSettings

log = logging.getLogger("w2s_fast.serve")


class Server(uvicorn.Server):
    """Told to stop, it first lets those in flight end: /ready says 503, and so does whatever comes.

    Told a second time, or after the time for it, it closes what is still open.
    """

    def __init__(self, config: uvicorn.Config, app: FastAPI, drain_seconds: float) -> None:
        super().__init__(config)
        self._app = app
        self._drain_seconds = drain_seconds
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        for server in self.servers:
            for one in server.sockets:
                host, port = one.getsockname()[:2]
                log.info("listening", extra={"host": host, "port": port})

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._draining is not None or self._loop is None or not self.started:
            super().handle_exit(sig, frame)
            return
        self._draining = self._loop.create_task(self._drain(sig))

    async def _drain(self, sig: int) -> None:
        service: Service = self._app.state.service
        log.info("draining", extra={"signal": signal.Signals(sig).name})
        whole = await service.gate.drain(self._drain_seconds)
        log.info("stopping", extra={"left": 0 if whole else service.gate.under_way})
        self.should_exit = True


def run_server(app: FastAPI, settings: ServerSettings, host: str, port: int) -> None:
    """Serve until SIGINT or SIGTERM; logs are JSON, a line each, on standard error."""
    logging.config.dictConfig(log_config())
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        server_header=False,
        # What is cut off after the time for draining is told so by its connection's end.
        timeout_graceful_shutdown=1,
    )
    Server(config, app, settings.limits.drain_seconds).run()


def log_config() -> dict[str, Any]:
    """Of :mod:`logging`."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {
            "json": {
                "()": "pythonjsonlogger.json.JsonFormatter",
                "fmt": "%(asctime)s %(levelname)s %(name)s %(message)s",
                "reserved_attrs": [*RESERVED_ATTRS, "color_message"],  # of uvicorn: twice the same
                "rename_fields": {"asctime": "time", "levelname": "level", "name": "logger"},
            }
        },
        "handlers": {
            "stderr": {
                "class": "logging.StreamHandler",
                "formatter": "json",
                "stream": "ext://sys.stderr",
            }
        },
        "loggers": {
            name: {"handlers": ["stderr"], "level": "INFO", "propagate": False}
            for name in ("w2s_fast.serve", "uvicorn.error")
        },
    }
