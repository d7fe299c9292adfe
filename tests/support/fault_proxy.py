"""A proxy in front of a server, which does to some requests what networks and busy servers do."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx2

Fault = Literal[
    "refused",  # closed, and nobody was asked
    "dropped",  # closed when there was an answer
    "delayed",
    "late",  # later than anybody waits
    "cut",  # closed in the middle of the answer
    "garbled",  # half of an answer, that says that it is whole
    "429",
    "500",
    "503",
    "fewer",  # half of the choices
    "none",  # no choices
]
HEADERS = {"429": (("Retry-After", "0.02"),), "503": (("Retry-After-Ms", "15"),), "500": ()}
LATE, DELAYED = 5.0, 0.03


@dataclass
class Passed:
    """A request, what was done to it, and the texts of the choices that its client was given."""

    body: dict[str, Any]
    fault: Fault | None
    given: list[str] = field(default_factory=list)


@dataclass
class Proxy:
    """A proxy that listens.

    Attributes:
        faults: of the next requests, in their order; none behind the last, or with a callable what
            it says of the number of a request.
        passed: all that came.
    """

    url: str
    faults: Sequence[Fault | None] | Callable[[int], Fault | None] = ()
    passed: list[Passed] = field(default_factory=list)

    def begin(self, faults: Sequence[Fault | None] | Callable[[int], Fault | None]) -> None:
        """Forget what came; these faults from here on."""
        self.faults = faults
        self.passed.clear()

    def _next(self) -> Fault | None:
        number = len(self.passed)
        if callable(self.faults):
            return self.faults(number)
        return self.faults[number] if number < len(self.faults) else None


@contextmanager
def fault_proxy(upstream: str) -> Iterator[Proxy]:
    """In front of a server's url, ``/v1`` included."""
    loop = asyncio.new_event_loop()
    up, own, stop = threading.Event(), Proxy(""), asyncio.Event()

    async def serve() -> None:
        async with httpx2.AsyncClient(base_url=upstream, timeout=60) as client:
            server = await asyncio.start_server(
                lambda reader, writer: _connected(own, client, reader, writer), "127.0.0.1", 0
            )
            own.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
            up.set()
            await stop.wait()
            server.close()

    def work() -> None:
        loop.run_until_complete(serve())
        if tasks := asyncio.all_tasks(loop):
            for task in tasks:
                task.cancel()
            loop.run_until_complete(asyncio.wait(tasks))
        loop.close()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert up.wait(30)
        yield own
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()


async def _connected(
    own: Proxy,
    client: httpx2.AsyncClient,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> None:
    with suppress(ConnectionError, asyncio.IncompleteReadError):
        while await _request(own, client, reader, writer):
            pass
    writer.close()


async def _request(
    own: Proxy,
    client: httpx2.AsyncClient,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> bool:
    """Whether the connection stays."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.strip().split("\r\n")
    method, path, _ = first.split(" ")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    content = await reader.readexactly(int(headers.get("content-length", 0)))
    fault = own._next() if method == "POST" else None
    passed = Passed(json.loads(content) if content else {}, fault)
    if method == "POST":
        own.passed.append(passed)
    if fault == "refused":
        return False
    if fault in ("429", "500", "503"):
        _write(writer, int(fault), b'{"error": {"message": "not now"}}', HEADERS[fault])
        return True
    if fault == "delayed":
        await asyncio.sleep(DELAYED)
    kept = {key: headers[key] for key in ("content-type", "authorization") if key in headers}
    answer = await client.request(method, path.removeprefix("/v1"), content=content, headers=kept)
    body = answer.content
    if fault == "late":
        await asyncio.sleep(LATE)
    if fault == "dropped":
        return False
    if fault == "cut":
        _write(writer, answer.status_code, body, cut=True)
        return False
    if fault == "garbled":
        body = body[: len(body) // 2]
    elif answer.status_code == 200 and method == "POST":
        found = json.loads(body)
        if fault in ("fewer", "none"):
            left = len(found["choices"]) // 2 if fault == "fewer" else 0
            found["choices"] = found["choices"][:left]
            body = json.dumps(found).encode()
        passed.given = [choice["text"] for choice in found["choices"]]
    _write(writer, answer.status_code, body)
    await writer.drain()
    return True


def _write(
    writer: asyncio.StreamWriter,
    status: int,
    body: bytes,
    headers: Sequence[tuple[str, str]] = (),
    cut: bool = False,
) -> None:
    lines = [
        f"HTTP/1.1 {status} X",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        *(f"{name}: {value}" for name, value in headers),
    ]
    writer.write(
        "\r\n".join(lines).encode() + b"\r\n\r\n" + body[: len(body) // 2 if cut else None]
    )
