"""Engines that two processes of Ray hold together: what one process finds, whoever dies."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
import ray
from pydantic import ValidationError
from ray import serve

import w2s_fast.ray
from tests.support.tiny_models import save_trio
from w2s_fast import Engine, Guide, SearchParams
from w2s_fast.errors import EngineFailure, InvalidRequest
from w2s_fast.ray import Pool, RankGroup
from w2s_fast.ray.group import _seats
from w2s_fast.serve.ray_app import build
from w2s_fast.serve.ray_config import RayConfig

pytestmark = pytest.mark.long

PARAMS = SearchParams(max_new_tokens=20, chunk_length=3, beam_width=2, successors=2)
ENGINE: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float64",
    "kv_cache_tokens": 2048,
    "max_rows": 32,
}
EACH = {"CPU": 0.1}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_trio(tmp_path_factory.mktemp("models"))


def guide(models: Path) -> Guide:
    return Guide(str(models / "tuned"), str(models / "untuned"))


def divided(models: Path) -> Engine:
    return Engine(str(models / "llama"), guide(models), tensor_parallel=2, **ENGINE)


@pytest.fixture(scope="module")
def alone(models: Path) -> Engine:
    return Engine(str(models / "llama"), guide(models), **ENGINE)


def others() -> set[int]:
    """Processes of this Ray that hold a rank other than the first."""
    found = set()
    session = ray._private.worker._global_node.get_session_dir_path()  # type: ignore[attr-defined]
    for process in psutil.process_iter():
        try:
            is_one = process.cmdline()[:1] == ["ray::_Rank.follow"]
            if is_one and any(session in word for word in process.parent().cmdline()):
                found.add(process.pid)
        except (psutil.Error, AttributeError):  # it has ended meanwhile
            continue
    return found


def until(what: Any, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.1)


# --- a group


def test_a_group_finds_what_one_process_finds_and_tells_of_a_rank_that_dies(
    ray_here: None, models: Path, alone: Engine
) -> None:
    """In an actor that ends with it: of one process there is one group."""

    def work() -> Any:
        group = RankGroup(partial(divided, models), 2, EACH)
        lost: list[str] = []
        group.watch(lost.append)
        with pytest.raises(EngineFailure, match="in a group of ranks"):
            RankGroup(partial(divided, models), 2, EACH)
        with group.engine.lead():
            found = [r.token_ids for r in group.engine.generate(["ab", "cd"], PARAMS)]
            before = group.alive
            ray.kill(group._ranks[0])
            until(lambda: lost, 20)
            after = group.alive
        group.close()
        return found, before, after, lost

    found, before, after, lost = ray.get(
        ray.remote(max_calls=1)(work).options(num_cpus=0.1).remote(), timeout=90
    )
    assert found == [r.token_ids for r in alone.generate(["ab", "cd"], PARAMS)]
    assert before and not after
    assert len(lost) == 1 and lost[0].startswith("rank 1 of 2: ")


class Holder:
    """An actor that holds a group."""

    def begin(self, models: Path) -> None:
        self._group = RankGroup(partial(divided, models), 2, EACH)


@pytest.mark.cluster
def test_no_rank_outlives_the_first_one(ray_here: None, models: Path) -> None:
    before = others()
    holder = ray.remote(Holder).options(num_cpus=0.1).remote()
    ray.get(holder.begin.remote(models), timeout=90)
    assert len(others() - before) == 1
    ray.kill(holder)
    until(lambda: not others() - before, 30)


def test_why_a_rank_failed_is_told_and_what_is_missing(ray_here: None, models: Path) -> None:
    def broken() -> Engine:
        if os.environ["RANK"] == "1":
            raise KeyError("it lies elsewhere")
        return divided(models)

    def work(make: Any, each: dict[str, float]) -> str:
        try:
            RankGroup(make, 2, each, seconds=2 if each["CPU"] > 1 else 60)
        except (EngineFailure, InvalidRequest) as error:
            return f"{type(error).__name__}: {error}"
        return "none"

    there = ray.remote(max_calls=1)(work).options(num_cpus=0.1)
    cases = [(broken, EACH), (partial(divided, models), {"CPU": 99.0}), (broken, {"CPU": 0.0})]
    first, second, third = ray.get([there.remote(*case) for case in cases], timeout=90)
    assert first == "EngineFailure: rank 1 of 2: KeyError: 'it lies elsewhere'"
    assert (
        "1 of 2 ranks have not begun, each of which needs 99 CPU; free in the cluster: " in second
    )
    assert third.startswith("InvalidRequest: a rank has no resources")


def test_a_rank_s_gpu_is_the_one_that_it_sees() -> None:
    one = [("a", 1), ("a", 1), ("b", 1), ("b", 1)]
    assert [seat["LOCAL_RANK"] for seat in _seats(one)] == [0, 0, 0, 0]
    assert [seat["LOCAL_RANK"] for seat in _seats([("a", 8), ("b", 8), ("a", 8)])] == [0, 0, 1]
    assert [seat["LOCAL_RANK"] for seat in _seats([("a", 0), ("a", 0)])] == [0, 1]
    apart = _seats([("a", 1), ("b", 1), ("a", 1)])
    assert [seat["LOCAL_WORLD_SIZE"] for seat in apart] == [2, 1, 2]


# --- batches


@pytest.mark.cluster
def test_a_dataset_under_a_rank_that_is_killed_has_one_result_a_prompt(
    ray_here: None, models: Path, alone: Engine
) -> None:
    rows = [{"prompt": f"film {i}", "seed": i} for i in range(64)]
    found = w2s_fast.ray.generate(
        ray.data.from_items(rows),
        str(models / "llama"),
        guide(models),
        PARAMS,
        num_cpus=0.1,
        tensor_parallel=2,
        **ENGINE,
    )
    before, killed = others(), threading.Event()

    def kill() -> None:
        until(lambda: others() - before)
        time.sleep(1.5)  # whatever it is at: it may be reading its model
        for pid in others() - before:
            os.kill(pid, signal.SIGKILL)
            killed.set()

    with ThreadPoolExecutor() as threads:
        killing = threads.submit(kill)
        back = {row["prompt"]: row for row in found.take_all()}
        killing.result()
    assert killed.is_set()
    prompts = [row["prompt"] for row in rows]
    assert sorted(back) == sorted(prompts)
    params = [replace(PARAMS, seed=i) for i in range(64)]
    for prompt, result in zip(prompts, alone.generate(prompts, params)):
        assert back[prompt]["error"] is None, back[prompt]["error"]
        assert list(back[prompt]["token_ids"]) == result.token_ids
    until(lambda: not others() - before, 30)


def test_actors_of_several_ranks_are_so_many() -> None:
    with pytest.raises(InvalidRequest, match="with tensor_parallel; allowed"):
        Pool((1, 2), tensor_parallel=2)
    assert Pool(2, tensor_parallel=2).actors == 2


# --- a server


@pytest.fixture(scope="module")
def url(ray_here: None, models: Path) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    config = {
        **ENGINE,
        "base": str(models / "llama"),
        "tuned": str(models / "tuned"),
        "untuned": str(models / "untuned"),
        "name": "tiny",
        "num_replicas": 2,
        "tensor_parallel": 2,
        "num_cpus": 0.1,
        "front_cpus": 0.1,
        "front_replicas": 1,
        "health_check_seconds": 1.0,
        "search": {
            "max_new_tokens": 20, "chunk_length": 3, "beam_width": 2, "successors": 2,
        },
    }  # fmt: skip
    serve.run(build(config), name="ranks", route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.mark.cluster
def test_requests_under_a_rank_that_is_killed_are_all_answered(
    url: str, models: Path, alone: Engine
) -> None:
    seeds = range(60)
    params = [replace(PARAMS, seed=seed) for seed in seeds]
    expected = [r.text for r in alone.generate(["film"] * len(params), params)]
    until(lambda: len(others()) == 2)
    victim = min(others())
    answered: list[int] = []

    with httpx2.Client(base_url=url, timeout=120) as client:

        def ask(seed: int) -> Any:
            body = {"model": "tiny", "prompt": "film", "seed": seed}
            found = client.post("/v1/completions", json=body)
            answered.append(seed)
            if len(answered) == 10:
                os.kill(victim, signal.SIGKILL)
            assert found.status_code == 200, found.text
            return found.json()["choices"][0]["text"]

        with ThreadPoolExecutor(16) as threads:
            assert list(threads.map(ask, seeds)) == expected
        # Serve begins another replica, with ranks of its own.
        until(lambda: len(others()) == 2 and victim not in others())
        # One that nobody asks is replaced, too.
        before = others()
        victim = min(before)
        os.kill(victim, signal.SIGKILL)
        until(lambda: len(others()) == 2 and others() != before)
        assert ask(0) == expected[0]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"compile": True}, "neither with base_url nor with compile"),
        ({"base": None, "base_url": "http://h/v1"}, "neither with base_url"),
        ({"num_cpus": 0, "device": "cpu"}, "a rank needs one of them"),
        ({"tensor_parallel": 0}, "tensor_parallel"),
        ({"placement_strategy": "SPREAD"}, "placement_strategy"),
    ],
)
def test_ranks_that_cannot_be_are_refused_where_they_are_written(given: Any, told: str) -> None:
    whole = {"base": "x", "search": {"method": "sample"}, "tensor_parallel": 2, **given}
    with pytest.raises(ValidationError, match=told):
        RayConfig.model_validate(whole)
