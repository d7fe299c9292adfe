"""Many clients of one server: every answer is the one that its seed has alone, whatever others do.

    python -m bench.serving --out bench/results/serving.json      200 clients for 60 s
    python -m bench.serving --clients 20 --seconds 5              fewer

The server is a process of its own (`w2s-fast serve`, the bundled models). First every question is
asked alone; then all clients ask at once, some of them streams. Beside them, of any hundred
clients, ten leave in the middle of an answer, five read slowly, and five send what is no body. In
the end the server is told to stop while all of them ask: what is under way is answered, and what
comes is sent away.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from bench.reports import facts, save

PROMPTS = ("The film", "I have just read", "The waiter", "This place", "My sister says", "After")
QUESTIONS = 48
TOKENS = 16
# Of any hundred clients.
LEAVING, SLOW, MALFORMED = 10, 5, 5
BAD_BODIES = (
    b"",
    b"{",
    b"[]",
    b'{"prompt": 1}',
    b'{"prompt": "a", "n": -1}',
    b'{"prompt": "a", "num_beams": 4}',
    b'{"prompt": "' + b"a" * 100_000 + b'"}',
    b"[" * 50_000,
)
# In float32 a draw may lie so near a boundary that other neighbours in a batch, whose products
# round otherwise, carry it over: of these questions one did (docs/determinism.md).
EXACT = ("--dtype", "float64")
JSON = {"content-type": "application/json"}


@dataclass
class Seen:
    """What the clients saw.

    Attributes:
        outcomes: how many requests ended in which way.
        wrong: answers that are not those of the same seed alone.
        seconds: of each whole answer. first: until a stream said something.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)


@contextmanager
def served(arguments: list[str]) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server's address, and its process."""
    command = [sys.executable, "-m", "w2s_fast.cli", "serve", "--port", "0", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            told = json.loads(line) if line.startswith("{") else {}
            if told.get("message") == "listening":
                break
        else:
            raise RuntimeError("the server did not start")
        # Whoever does not read the rest of its log would hold it up.
        drain = subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)
        try:
            yield f"http://127.0.0.1:{told['port']}", process
        finally:
            process.kill()
            process.wait()
            drain.wait()
    finally:
        process.kill()


def questions() -> list[dict[str, Any]]:
    rng = random.Random(0)
    return [
        {
            "prompt": PROMPTS[i % len(PROMPTS)],
            "seed": i,
            "max_tokens": rng.choice((TOKENS // 2, TOKENS)),
            "beam_width": 2,
            "successors": 2,
        }
        for i in range(QUESTIONS)
    ]


async def ask(http: httpx2.AsyncClient, body: dict[str, Any]) -> str:
    """The text."""
    answer = await http.post("/v1/completions", json=body)
    answer.raise_for_status()
    text: str = answer.json()["choices"][0]["text"]
    return text


async def ask_stream(
    http: httpx2.AsyncClient, body: dict[str, Any], seen: Seen, pause: float, leave: bool
) -> str | None:
    """The text; None if this client left before its end."""
    begin, text = time.perf_counter(), ""
    told = {**body, "stream": True}
    async with http.stream("POST", "/v1/completions", json=told) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            if not text:
                seen.first.append(time.perf_counter() - begin)
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            text += event["choices"][0]["text"]
            if leave:
                return None
            await asyncio.sleep(pause)
    return text


async def client(
    number: int,
    http: httpx2.AsyncClient,
    asked: list[dict[str, Any]],
    alone: list[str],
    seen: Seen,
    stop: asyncio.Event,
) -> None:
    rng = random.Random(number)
    kind = number % 100
    while not stop.is_set():
        i = rng.randrange(len(asked))
        begin = time.perf_counter()
        try:
            if kind < MALFORMED:
                bad = rng.choice(BAD_BODIES)
                answer = await http.post("/v1/completions", content=bad, headers=JSON)
                seen.outcomes[f"malformed: {answer.status_code}"] += 1
                await asyncio.sleep(0.05)
                continue
            leaves = kind < MALFORMED + LEAVING
            slow = not leaves and kind < MALFORMED + LEAVING + SLOW
            if leaves or slow or number % 2:
                text = await ask_stream(http, asked[i], seen, 0.05 if slow else 0.0, leaves)
            else:
                text = await ask(http, asked[i])
        except httpx2.HTTPStatusError as error:
            when = "after SIGTERM" if stop.is_set() else "sent away"
            seen.outcomes[f"{when}: {error.response.status_code}"] += 1
            await asyncio.sleep(0.1)
            continue
        except (httpx2.HTTPError, RuntimeError) as error:
            if stop.is_set():  # the server is gone, or told this one so
                seen.outcomes["after the end"] += 1
                return
            seen.outcomes[f"lost: {type(error).__name__}: {error}"] += 1
            continue
        if text is None:
            seen.outcomes["left"] += 1
            continue
        seen.outcomes["answered"] += 1
        seen.seconds.append(time.perf_counter() - begin)
        if text != alone[i]:
            seen.wrong.append(f"{asked[i]}: {text!r} for {alone[i]!r}")


def resident_mib(process: subprocess.Popen[str]) -> float:
    with suppress(OSError):
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) / 1024
    return 0.0


async def run(url: str, process: subprocess.Popen[str], clients: int, seconds: float) -> Any:
    asked = questions()
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=clients)
    async with httpx2.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
        begin = time.perf_counter()
        alone = [await ask(http, body) for body in asked]
        one = (time.perf_counter() - begin) / len(asked)
        memory = resident_mib(process)
        seen, stop = Seen(), asyncio.Event()
        begin = time.perf_counter()
        tasks = [
            asyncio.ensure_future(client(i, http, asked, alone, seen, stop)) for i in range(clients)
        ]
        await asyncio.sleep(seconds)
        load = time.perf_counter() - begin
        answered = seen.outcomes["answered"]
        grown = resident_mib(process) - memory
        stop.set()
        process.send_signal(signal.SIGTERM)
        within = sum(not task.done() for task in tasks)
        await asyncio.sleep(0.1)
        late = [(await http.get("/ready")).status_code]
        late.append((await http.post("/v1/completions", json=asked[0])).status_code)
        await asyncio.gather(*tasks)
        code = await asyncio.to_thread(process.wait, 120)
    times = sorted(seen.seconds)

    def at(share: float) -> float:
        return times[min(len(times) - 1, int(share * len(times)))] if times else float("nan")

    return {
        "clients": clients,
        "seconds": load,
        "outcomes": dict(seen.outcomes),
        "wrong": seen.wrong,
        "answers a second": answered / load,
        "one answer alone, s": one,
        "answer, s": {"median": at(0.5), "95 %": at(0.95), "99 %": at(0.99)},
        "first piece of a stream, s": statistics.median(seen.first) if seen.first else None,
        "server's memory grew by, MiB": grown,
        "within at SIGTERM": within,
        "/ready and a body after it": late,
        "exit code after it": code,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.serving")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--queue", type=int, default=512)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with served(["--max-queue", str(args.queue), *EXACT]) as (url, process):
        found = asyncio.run(run(url, process, args.clients, args.seconds))
    print(json.dumps(found, indent=2))
    said = facts("bench.serving", sys.argv[1:] if arguments is None else arguments)
    save(args.out, {**said, **found}, complete=True)
    lost = [name for name in found["outcomes"] if name.startswith(("lost", "sent away: 5"))]
    return 1 if found["wrong"] or lost or found["exit code after it"] != 0 else 0


if __name__ == "__main__":
    sys.exit(main())
