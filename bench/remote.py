"""A base that is somebody else's server against the same base here: as good, and at which price.

    python -m bench.remote --out bench/results/remote.json
    python -m bench.remote --quick                          two prompts: does it run?

The bundled models. The base runs here, behind `w2s-fast serve`, and behind `transformers serve`,
each a process of its own; the guides run here every time. The same prompts, each with a seed of its
own. Samples differ, so rewards do: an interval of the difference, prompt by prompt, that holds 0
says that they are as good.
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.reports import facts, run, save
from w2s_fast import Engine, Guide, RemoteBase, SearchParams, SearchResult
from w2s_fast.demo import Mean, demo_model_paths, gold_reward, held_out_prompts, mean_with_interval

SEARCH = SearchParams(
    beam_width=4, successors=4, chunk_length=5, max_new_tokens=30, temperature=0.7, top_k=50
)
START_SECONDS = 120.0
HERE = "here"
WIDTH = 100  # columns


@dataclass(frozen=True)
class Row:
    """One kind of base.

    Attributes:
        reward: gold reward of prompt and answer. difference: from the same base here, prompt by
            prompt; None of itself.
        seconds: of all prompts. requests: to the server, a prompt.
    """

    base: str
    prompts: int
    reward: Mean
    difference: Mean | None
    seconds: float
    requests: float


@contextmanager
def serving(command: Sequence[str], path: str, **environment: str) -> Iterator[str]:
    """The URL of a server that answers. RuntimeError: it does not come up.

    ``command``: with {port} in it. ``path``: that answers when it is there.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [part.format(port=port) for part in command],
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(int(START_SECONDS / 0.2)):
            if process.poll() is not None:
                raise RuntimeError(f"{command[1:3]} ended with {process.returncode}")
            try:
                urllib.request.urlopen(url + path, timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        else:
            raise RuntimeError(f"{command[1:3]} did not come up")
        yield f"{url}/v1"
    finally:
        process.terminate()
        process.wait(30)


def own_server(base: Path) -> Any:
    """The base alone, behind this package's server."""
    command = [sys.executable, "-m", "w2s_fast.cli", "serve", "--port", "{port}"]
    return serving([*command, "--base", str(base), "--name", str(base)], "/ready")


def transformers_server(base: Path) -> Any:
    """The same behind transformers' server."""
    script = str(Path(sys.executable).with_name("transformers"))
    command = [script, "serve", str(base), "--port", "{port}", "--device", "cpu"]
    # A small model on a thread: on several they wait for one another.
    return serving(command, "/health", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")


def searched(engine: Engine, prompts: Sequence[str]) -> tuple[list[SearchResult], float]:
    """Results, and seconds."""
    seeds = random.Random(0)
    params = [replace(SEARCH, seed=seeds.getrandbits(63)) for _ in prompts]
    begin = time.perf_counter()
    found = engine.generate(prompts, params, progress=False)
    return found, time.perf_counter() - begin


def rewards(prompts: Sequence[str], results: Sequence[SearchResult]) -> list[float]:
    return [gold_reward(prompt + (r.text or "")) for prompt, r in zip(prompts, results)]


def measured(counts: dict[str, int]) -> Iterator[Row]:
    """``counts``: prompts of each kind of base."""
    paths = demo_model_paths()
    guide = Guide(str(paths.tuned), str(paths.untuned))
    prompts = held_out_prompts(max(counts.values()))
    results, seconds = searched(Engine(str(paths.base), guide, device="cpu"), prompts)
    here = rewards(prompts, results)
    yield Row(HERE, len(prompts), mean_with_interval(here), None, seconds, 0.0)
    for name, server in (
        ("w2s-fast serve", own_server),
        ("transformers serve", transformers_server),
    ):
        asked = prompts[: counts[name]]
        with server(paths.base) as url, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a server without n
            engine = Engine(RemoteBase(url, model=str(paths.base)), guide, device="cpu")
            results, seconds = searched(engine, asked)
        own = rewards(asked, results)
        requests = [r.usage.remote.requests for r in results if r.usage.remote is not None]
        yield Row(
            name,
            len(asked),
            mean_with_interval(own),
            mean_with_interval([a - b for a, b in zip(own, here)]),
            seconds,
            sum(requests) / len(requests),
        )


def show(rows: Sequence[Row]) -> None:
    table = Table(title="the bundled base, here and behind servers; gold reward, 95 % intervals")
    for name in ("base", "prompts", "reward", "less that here", "s a prompt", "requests a prompt"):
        table.add_column(name, justify="left" if name == "base" else "right")
    for row in rows:
        table.add_row(
            row.base,
            str(row.prompts),
            row.reward.shown(),
            "" if row.difference is None else row.difference.shown(),
            f"{row.seconds / row.prompts:.2f}",
            f"{row.requests:.0f}" if row.requests else "",
        )
    Console(width=WIDTH).print(table)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.remote")
    parser.add_argument("--quick", action="store_true", help="two prompts: does it run?")
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument(
        "--few", type=int, default=20, help="of a server that gives one sample a request"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    prompts, few = (2, 2) if options.quick else (options.prompts, options.few)
    counts = {"w2s-fast serve": prompts, "transformers serve": min(prompts, few)}
    report: dict[str, Any] = facts("bench.remote", arguments or sys.argv[1:])
    rows: list[Row] = []
    for row in measured(counts):
        rows.append(row)
        save(options.out, {**report, "rows": [asdict(r) for r in rows]}, complete=False)
    save(options.out, {**report, "rows": [asdict(r) for r in rows]}, complete=True)
    show(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
