"""Recorded passes on the device: the same search with CUDA graphs, compiled, and without."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.test_search import models, results
from tests.support.cohorts import in_cohorts
from w2s_fast import Engine, Guide
from w2s_fast.decoding.lane import Lane
from w2s_fast.decoding.pass_graphs import PassGraphs
from w2s_fast.models.model import PagedModel


def engine_of(**options: bool) -> Engine:
    base, tuned, untuned = models(torch.float32)
    return Engine(base, Guide(tuned, untuned), device="cuda", kv_cache_tokens=4096, **options)


def tokens(engine: Engine) -> list[list[list[int]]]:
    return [[h.token_ids for h in result.hypotheses] for result in results(engine)]


@pytest.fixture(scope="module")
def expected() -> list[list[list[int]]]:
    return tokens(engine_of(cuda_graphs=False))


def paged(engine: Engine) -> list[PagedModel]:
    return [engine.base, *engine.guides[0].models]


@pytest.mark.parametrize("compile", [False, True])
def test_a_search_with_graphs_finds_the_same(
    compile: bool, expected: list[list[list[int]]]
) -> None:
    engine = engine_of(compile=compile)
    graphs = engine._search.base.expansion.decoder.graphs
    assert graphs is not None and len(graphs.recordings) > 5
    for _ in range(3):  # shapes that come again are recorded
        assert tokens(engine) == expected
    for model in paged(engine):
        assert isinstance(model.replays, PassGraphs)
        assert len(model.replays.recordings) > 3, model.name
        model.pool.drop_cache()
        assert model.pool.free_pages == model.pool.num_pages


def test_two_engines_do_not_share_what_they_replay(expected: list[list[list[int]]]) -> None:
    engines = [engine_of(), engine_of()]
    for _ in range(2):
        assert [tokens(engine) for engine in engines] == [expected] * 2


def test_two_cohorts_find_the_same(expected: list[list[list[int]]]) -> None:
    engine = in_cohorts(engine_of())
    for _ in range(3):
        assert tokens(engine) == expected
    assert engine.stats().steps > 0 and not engine.runner._in_flight
    for model in paged(engine):
        model.pool.drop_cache()
        assert model.pool.free_pages == model.pool.num_pages


def test_work_beside_is_done_after_what_came_before_and_before_what_comes_after() -> None:
    lane, size = Lane(torch.device("cuda")), 4096
    a = torch.randn(size, size, device="cuda")
    for step in range(20):
        x = a @ a  # long enough that nothing would be in order by chance
        x.fill_(step)
        with lane.beside():
            y = a @ a
            y.copy_(x)
        lane.join()
        z = y + 1
        x.fill_(-1)
        assert float(z.min()) == float(z.max()) == step + 1
