"""Two replicas on a real Ray, and OpenAI's client: all is as with one server, and more survives."""

from __future__ import annotations

import asyncio
import re
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import httpx2
import openai
import pytest
import ray
from ray import serve

from w2s_fast import Engine, Guide, SearchParams
from w2s_fast.demo import demo_model_paths
from w2s_fast.serve.ray_app import build

pytestmark = pytest.mark.long

SEARCH = {"beam_width": 2, "successors": 2, "max_new_tokens": 12}
CONFIG = {
    "num_replicas": 2,
    "device": "cpu",
    "dtype": "float64",
    "kv_cache_tokens": 8192,
    "max_rows": 64,
    "search": SEARCH,
    "max_body": 100_000,
    "num_cpus": 0.1,
    "front_cpus": 0.1,
    "front_replicas": 1,
    "health_check_seconds": 1.0,
}


@dataclass
class Application:
    url: str
    name: str

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0)

    def shared(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=120
        )

    def told(self, metric: str) -> dict[str, float]:
        """A metric of each replica, by its name, summed over other labels."""
        found: dict[str, float] = {}
        for line in httpx2.get(f"{self.url}/metrics", timeout=60).text.splitlines():
            if match := re.match(rf'{metric}{{.*replica="(\w+)".*}} (.*)', line):
                found[match[1]] = found.get(match[1], 0.0) + float(match[2])
        return found


def replicas() -> list[str]:
    """Names of the actors that hold engines."""
    names = ray.util.list_named_actors(all_namespaces=True)
    return [one["name"] for one in names if re.search(r"REPLICA.*#Replica#", one["name"])]


def until(what: Callable[[], bool], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.fixture(scope="module")
def application(ray_here: None) -> Iterator[Application]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build(CONFIG), name="w2s", route_prefix="/")
    yield Application(f"http://127.0.0.1:{port}", "w2s")
    serve.shutdown()


@pytest.fixture(scope="module")
def alone() -> Engine:
    """The same engine, here."""
    paths = demo_model_paths()
    guide = Guide(str(paths.tuned), str(paths.untuned))
    return Engine(
        str(paths.base), guide, device="cpu", dtype="float64", kv_cache_tokens=8192, max_rows=64
    )


def expected(alone: Engine, prompts: list[str], seeds: list[int]) -> list[str]:
    params = [SearchParams(**SEARCH, seed=seed) for seed in seeds]  # type: ignore[arg-type]
    return [str(r.text) for r in alone.generate(prompts, params)]


def test_answers_are_those_of_one_engine(application: Application, alone: Engine) -> None:
    client = application.client()
    (text,) = expected(alone, ["The film"], [5])
    found = client.completions.create(model="bundled", prompt="The film", seed=5)
    assert found.choices[0].text == text and found.usage is not None
    pieces = client.completions.create(model="bundled", prompt="The film", seed=5, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == text
    assert [model.id for model in client.models.list()] == ["bundled"]


def test_errors_and_pages_are_as_with_one_server(application: Application) -> None:
    client = application.client()
    with pytest.raises(openai.NotFoundError, match="not served"):
        client.completions.create(model="gpt-5", prompt="ab")
    with pytest.raises(openai.BadRequestError, match="n is 0"):
        client.completions.create(model="bundled", prompt="ab", n=0)
    with pytest.raises(openai.BadRequestError, match="n is 0"):
        list(client.completions.create(model="bundled", prompt="ab", n=0, stream=True))
    with httpx2.Client(base_url=application.url, timeout=60) as http:
        large = http.post("/v1/completions", json={"prompt": "x" * 200_000})
        assert large.status_code == 413 and large.json()["error"]["code"] == "body_too_large"
        assert http.get("/ready").json() == {"status": "ready"}
        assert "<title>w2s-fast</title>" in http.get("/").text
        assert http.get("/nowhere").status_code == 404
        told = http.get("/health", headers={"x-request-id": "mine"})
        assert told.headers.get_list("x-request-id") == ["mine"]


def test_requests_that_begin_alike_go_to_one_replica(application: Application) -> None:
    client = application.client()
    texts = [f"{word} film was long and slow, and then it was the best of them all. " * 2
             for word in ("One", "Another", "A third", "A fourth")]  # fmt: skip
    for text in texts:
        client.completions.create(model="bundled", prompt=text, seed=1)
    # By chance alone, one in 65,536 times.
    for text in texts:
        for end in "abcd":
            found = client.completions.create(model="bundled", prompt=text + end, seed=1)
            assert found.usage is not None and found.usage.prompt_tokens_details is not None
            assert found.usage.prompt_tokens_details.cached_tokens >= 16
    assert all(application.told("w2s:request_success_total").values())  # nor all to one


def test_a_client_that_leaves_is_not_answered_any_further(application: Application) -> None:
    body = {"prompt": "The film", "stream": True, "max_tokens": 400, "ignore_eos": True}
    with httpx2.stream("POST", f"{application.url}/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    until(lambda: sum(application.told("w2s:num_requests_running").values()) == 0, 30)
    failed = sum(application.told("w2s:request_failure_total").values())
    assert failed >= 1


def test_a_replica_that_is_killed_loses_no_request(application: Application, alone: Engine) -> None:
    seeds = list(range(40))
    texts = expected(alone, ["The film"] * 40, seeds)
    until(lambda: len(application.told("w2s:steps_total")) == 2)
    victim, survivor = replicas()

    async def ask() -> list[str]:
        async with application.shared() as client:

            async def one(seed: int) -> str:
                found = await client.completions.create(
                    model="bundled", prompt="The film", seed=seed
                )
                return found.choices[0].text

            async def kill() -> None:
                running = 0.0
                while running < 3:
                    told = await asyncio.to_thread(application.told, "w2s:num_requests_running")
                    running = told[victim.split("#")[-1]]
                ray.kill(ray.get_actor(victim, namespace="serve"))

            answers, _ = await asyncio.gather(asyncio.gather(*map(one, seeds)), kill())
            return answers

    assert asyncio.run(ask()) == texts
    # Serve begins another one in its place.
    until(lambda: len(application.told("w2s:steps_total")) == 2)
    assert victim not in replicas() and survivor in replicas()


def test_streams_under_a_replica_that_is_killed_are_whole_or_say_so(
    application: Application, alone: Engine
) -> None:
    seeds = list(range(20))
    texts = expected(alone, ["The film"] * 20, seeds)
    until(lambda: len(application.told("w2s:steps_total")) == 2)

    lost: list[str] = []

    async def ask() -> list[str | None]:
        async with application.shared() as client:
            first = asyncio.Event()

            async def one(seed: int) -> str | None:
                text = ""
                stream = await client.completions.create(
                    model="bundled", prompt="The film", seed=seed, stream=True
                )
                try:
                    async for piece in stream:
                        first.set()
                        text += piece.choices[0].text
                except openai.APIError as error:
                    lost.append(str(error))
                    return text if texts[seed].startswith(text) else None
                return text

            async def kill() -> None:
                await first.wait()
                ray.kill(ray.get_actor(replicas()[0], namespace="serve"))

            answers, _ = await asyncio.gather(asyncio.gather(*map(one, seeds)), kill())
            return answers

    found = asyncio.run(ask())
    assert None not in found  # what has been said was right
    assert all("replica was lost" in error for error in lost)
    assert sum(text != whole for text, whole in zip(found, texts)) <= len(lost) <= 10
