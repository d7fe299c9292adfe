"""Batches on a real Ray: every prompt has one result, that of an engine here, whatever happens."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray

import w2s_fast.ray
from tests.support.ray_actors import DEADLY, PARAMS, Mortal, make, make_noted
from w2s_fast import Engine, Guide, SearchParams
from w2s_fast.demo import demo_model_paths
from w2s_fast.errors import InvalidRequest
from w2s_fast.ray import Engines, Pool, connected
from w2s_fast.ray.datasets import RowSearcher

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("ray_here")]

PROMPTS: list[Any] = [f"The film number {i}" for i in range(24)]
SMALL = Pool(2, num_cpus=0.1, max_rows=32)


@pytest.fixture(scope="module")
def alone() -> Engine:
    return make()


def texts_of(engine: Engine, prompts: list[Any]) -> list[str | None]:
    return [
        None if r.error else r.text for r in engine.generate(prompts, PARAMS, on_error="return")
    ]


def test_an_actor_that_is_killed_loses_no_prompt_and_doubles_none(
    alone: Engine, tmp_path: Path
) -> None:
    """Nor does a prompt whose request fails harm any other."""
    prompts = [*PROMPTS, [10**8], *PROMPTS * 3]
    params = [replace(PARAMS, seed=seed) for seed in range(len(prompts))]
    engines = Engines(partial(make_noted, tmp_path), SMALL, PARAMS)
    found = []
    for index, result in engines.as_completed(prompts, params):
        if not found:
            os.kill(int(min(tmp_path.iterdir()).name), signal.SIGKILL)
        found.append((index, result))
    assert len(found) == len(dict(found)) == len(prompts)
    # Where the other one is quick enough, the one that died need not begin again.
    assert len(list(tmp_path.iterdir())) >= 2
    expected = alone.generate(prompts, params, on_error="return")
    for index, result in found:
        assert result.hypotheses == expected[index].hypotheses
        assert isinstance(result.error, InvalidRequest) == (index == 24)
    stats = engines.stats()
    assert (stats.finished, stats.failed) == (len(prompts) - 1, 1)
    assert stats.sampled_tokens == sum(r.usage.sampled_tokens for r in expected)


@pytest.mark.cluster
def test_a_prompt_that_kills_its_process_is_given_up_and_the_others_are_answered(
    alone: Engine, tmp_path: Path
) -> None:
    prompts = [*PROMPTS[:5], DEADLY, *PROMPTS[5:8]]
    engines = Engines(partial(Mortal, tmp_path), Pool(1, num_cpus=0.1, max_rows=32), PARAMS)  # type: ignore[arg-type]
    found = list(engines.as_completed(prompts, [PARAMS] * len(prompts)))
    assert sorted(index for index, _ in found) == list(range(len(prompts)))
    results = dict(found)
    assert "no actor could answer it" in str(results.pop(5).error)
    assert [results[i].text for i in sorted(results)] == texts_of(alone, PROMPTS[:8])


def test_a_row_is_answered_as_a_prompt_is_and_keeps_its_other_columns(alone: Engine) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "The film", "messages": None, "seed": 7, "n": None, "mine": [1]},
        {"prompt": None, "messages": None, "seed": None, "n": None, "mine": [2]},
        {"prompt": "The book", "messages": None, "seed": None, "n": 0, "mine": [3]},
        {"prompt": "The book", "messages": None, "seed": None, "n": 2, "mine": [4]},
    ]
    found = RowSearcher(lambda: alone, PARAMS)(pa.Table.from_pylist(rows)).to_pylist()
    assert [row["mine"] for row in found] == [[1], [2], [3], [4]]
    first, last = (
        alone.generate(prompt, replace(PARAMS, **own))[0]
        for prompt, own in (("The film", {"seed": 7}), ("The book", {"n": 2}))
    )
    assert (found[0]["text"], found[0]["score"]) == (first.text, first.score)
    assert [one["text"] for one in found[3]["hypotheses"]] == [h.text for h in last.hypotheses]
    assert "one" in found[1]["error"]["message"] and "n is 0" in found[2]["error"]["message"]
    assert found[1]["text"] is None and found[1]["usage"] is None


@pytest.mark.cluster
def test_a_dataset_s_rows_come_back_with_results(alone: Engine, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"id": f"row {i}", "prompt": prompt, "seed": None, "successors": None}
        for i, prompt in enumerate(PROMPTS[:6])
    ]
    rows[1]["seed"] = 7
    rows[2]["successors"] = -1
    ray.data.from_items(rows).write_parquet(str(tmp_path / "in"))
    paths = demo_model_paths()
    found = w2s_fast.ray.generate(
        ray.data.read_parquet(str(tmp_path / "in")),
        str(paths.base),
        Guide(str(paths.tuned), str(paths.untuned)),
        PARAMS,
        num_cpus=0.1,
        dtype="float64",
        kv_cache_tokens=8192,
        max_rows=32,
    )
    found.write_parquet(str(tmp_path / "out"))
    back = {row["id"]: row for row in ray.data.read_parquet(str(tmp_path / "out")).take_all()}
    assert sorted(back) == [row["id"] for row in rows]
    seeded = replace(PARAMS, seed=7)
    params = [PARAMS, seeded, PARAMS, PARAMS, PARAMS, PARAMS]
    for i, result in enumerate(alone.generate(PROMPTS[:6], params)):
        own = back[f"row {i}"]
        if i == 2:
            assert own["error"]["type"] == "InvalidRequest" and own["text"] is None
            continue
        assert (own["text"], list(own["token_ids"])) == (result.text, result.token_ids)
        assert own["prompt"] == PROMPTS[i] and own["error"] is None
        assert own["usage"]["sampled_tokens"] == result.usage.sampled_tokens
        assert "seed" not in own and len(own["hypotheses"]) == 1


def test_who_is_connected_stays_so() -> None:
    with connected():
        pass
    assert ray.is_initialized()


@pytest.mark.parametrize("actors", [0, (2, 1)])
def test_no_actors_are_refused(actors: Any) -> None:
    with pytest.raises(InvalidRequest, match="actors is"):
        Pool(actors)


def test_small_prompts_are_given_in_small_tasks() -> None:
    assert Pool(max_rows=256).rows_of_task(SearchParams(beam_width=2, successors=2)) == 8
    assert Pool(max_rows=8).rows_of_task(SearchParams(beam_width=4, successors=4)) == 1
