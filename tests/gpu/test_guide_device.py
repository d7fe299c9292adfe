"""Guides on another device than the base: on a second GPU, and on the CPU."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.tiny_models import tiny_model
from w2s_fast import Engine, Guide, SearchParams, SearchResult

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]]
SEARCH = SearchParams(beam_width=2, successors=3, chunk_length=3, max_new_tokens=12)
PARAMS = [
    SEARCH,
    SearchParams(method="bon", successors=4, n=2, max_new_tokens=10),
    SearchParams(method="fusion", n=3, max_new_tokens=9, plausibility=0.05),
    SearchParams(method="dynamic_fusion", n=2, max_new_tokens=9),
    replace(SEARCH, proposal="fusion"),
    SearchParams(method="beam", beam_width=3, n=2, max_new_tokens=10),
]


def tiny(seed: int, family: str = "gpt2") -> Any:
    return copy.deepcopy(tiny_model(family, seed=seed, layers=1, dtype=torch.float32))


def engine(there: str, **options: Any) -> Engine:
    guide = Guide(tiny(1), tiny(2), device=there)
    return Engine(tiny(0, "llama"), guide, device="cuda:0", kv_cache_tokens=4096, **options)


def run(made: Engine) -> list[list[SearchResult]]:
    """Twice what comes twice: what was recorded meanwhile is replayed."""
    for _ in range(2):
        found = [made.generate(PROMPTS, params) for params in PARAMS]
    return found


@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize("there", ["cuda:1", "cpu"])
def test_guides_elsewhere_find_the_same(there: str, cuda_graphs: bool) -> None:
    if there == "cuda:1" and torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    beside, apart = (engine(own, cuda_graphs=cuda_graphs) for own in ("cuda:0", there))
    devices = {str(model.device) for guide in apart.guides for model in guide.models}
    assert devices == {there} and str(apart.base.device) == "cuda:0"
    for ours, theirs in zip(run(apart), run(beside), strict=True):
        for own, other in zip(ours, theirs, strict=True):
            pairs = list(zip(own.hypotheses, other.hypotheses, strict=True))
            assert [a.token_ids for a, _ in pairs] == [b.token_ids for _, b in pairs]
            assert [a.score for a, _ in pairs] == pytest.approx(
                [b.score for _, b in pairs], abs=1e-3
            )
    scores = [made.score([[1], [2, 3]], [[4, 5], [6]]) for made in (apart, beside)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)
    assert torch.cuda.current_device() == 0
