"""The engine finds what the naive reference finds: tokens, scores, kept sets, trace and usage."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.support.drawn import drawn
from tests.support.reference import Reference, ReferenceGuide
from tests.support.results import assert_all_found, assert_same, decided
from tests.support.tiny_models import FAMILIES, VOCABULARY, tiny_model
from w2s_fast import Engine, Guide, SearchParams

EOS_SETS: tuple[tuple[int, ...], ...] = ((), (0,), (3, 7), (1, 4, 8, 11))
WEIGHTS: tuple[tuple[float, ...], ...] = ((1.0,), (0.5, -1.5), (2.0, 0.0))


def guide_models(weights: tuple[float, ...], dtype: torch.dtype) -> list[tuple[Any, Any, float]]:
    families = ("gpt2", "llama", "mistral")
    return [
        (
            tiny_model(families[g], seed=10 + g, layers=1, dtype=dtype),
            tiny_model(families[g + 1], seed=20 + g, layers=1, dtype=dtype),
            weight,
        )
        for g, weight in enumerate(weights)
    ]


@functools.cache
def engine_and_reference(
    family: str,
    eos: tuple[int, ...],
    weights: tuple[float, ...],
    page_size: int = 16,
    kv_cache_tokens: int = 4096,
    dtype: torch.dtype = torch.float64,
) -> tuple[Engine, Reference]:
    base = tiny_model(family, eos=eos, dtype=dtype)
    models = guide_models(weights, dtype)
    engine = Engine(
        base=base,
        guides=[Guide(tuned=t, untuned=u, weight=w) for t, u, w in models],
        device="cpu",
        page_size=page_size,
        kv_cache_tokens=kv_cache_tokens,
    )
    reference = Reference(
        base,
        [ReferenceGuide(t, u, w) for t, u, w in models],
        vocab_size=VOCABULARY,
        eos_token_ids=eos,
    )
    return engine, reference


@st.composite
def search_params(draw: st.DrawFn, method: str | None = None) -> SearchParams:
    method = method or draw(st.sampled_from(["cbs", "cbs", "cbs", "bon", "sample"]))
    width, successors = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    limit = {"cbs": width, "bon": successors, "sample": 4}[method]
    return SearchParams(
        method=method,  # type: ignore[arg-type]
        beam_width=width,
        successors=successors,
        chunk_length=draw(st.sampled_from([2, 1, 3, 5, 8, None])),
        max_new_tokens=draw(st.sampled_from([12, 10, 7, 3, 1])),
        temperature=draw(st.sampled_from([0.7, 1.0, 1.5, 0.3, 0.0])),
        top_k=draw(st.sampled_from([0, 50, 5, 2, 1])),
        top_p=draw(st.sampled_from([1.0, 0.95, 0.7])),
        min_p=draw(st.sampled_from([0.0, 0.05])),
        seed=draw(st.integers(0, 2**64 - 1)),
        stop_token_ids=draw(st.sampled_from([(), (2,), (5, 0)])),
        ignore_eos=draw(st.sampled_from([False, False, True])),
        n=draw(st.integers(1, limit)),
        trace=True,
        finished=draw(st.sampled_from(["hold", "replicate"])),
        dedup=draw(st.booleans()) if method != "sample" else False,
        score=draw(st.sampled_from(["sum", "mean"])),
    )


prompts = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=7)


@drawn(80)
@given(
    family=st.sampled_from(FAMILIES),
    eos=st.sampled_from(EOS_SETS),
    weights=st.sampled_from(WEIGHTS),
    page_size=st.sampled_from([1, 3, 16]),
    requests=st.lists(st.tuples(prompts, search_params()), min_size=1, max_size=3),
)
def test_any_search_finds_what_the_reference_finds(
    family: str,
    eos: tuple[int, ...],
    weights: tuple[float, ...],
    page_size: int,
    requests: list[tuple[list[int], SearchParams]],
) -> None:
    engine, reference = engine_and_reference(family, eos, weights, page_size)
    assert_all_found(engine, reference, requests)


@drawn(25)
@given(
    eos=st.sampled_from(EOS_SETS[2:]),
    params=search_params("cbs"),
    seeds=st.lists(st.integers(0, 99), min_size=2, max_size=4),
)
def test_any_search_in_too_few_pages_finds_the_same(
    eos: tuple[int, ...], params: SearchParams, seeds: list[int]
) -> None:
    # Room for one request of the largest kind, 12 rows of 12 tokens and one page, and no more.
    engine, reference = engine_and_reference("llama", eos, (1.0,), 2, 176)
    requests = [SearchParams(**{**vars(params), "seed": seed}) for seed in seeds]
    assert_all_found(engine, reference, [([3, 5, 7, 2], p) for p in requests])


@drawn(25)
@given(
    family=st.sampled_from(["gpt2", "llama", "gemma2"]),
    eos=st.sampled_from(EOS_SETS[1:]),
    prompt=prompts,
    params=search_params(),
)
def test_float32_models_find_the_same_unless_rounding_decides(
    family: str, eos: tuple[int, ...], prompt: list[int], params: SearchParams
) -> None:
    engine, reference = engine_and_reference(family, eos, (1.0,), dtype=torch.float32)
    expected = reference.search(prompt, params)
    assume(expected.draw_margin > 1e-4)
    assume(expected.score_margin > 1e-3)
    assert_same(engine.generate([prompt], params)[0], expected, atol=1e-3)


PAPER: dict[str, dict[str, Any]] = {
    "sentiment": {"beam_width": 4, "successors": 4, "chunk_length": 5, "max_new_tokens": 20},
    "instructions": {"beam_width": 2, "successors": 2, "chunk_length": 30, "max_new_tokens": 60},
    "best of 16": {"method": "bon", "successors": 16, "max_new_tokens": 20},
}


@pytest.mark.parametrize("finished", ["hold", "replicate"])
@pytest.mark.parametrize("name", PAPER)
def test_the_papers_settings_find_what_the_reference_finds(name: str, finished: Any) -> None:
    params = SearchParams(**PAPER[name], finished=finished, trace=True, seed=11)
    engine, reference = engine_and_reference("llama", (0,), (1.0,))
    expected = reference.search([4, 9, 1], params)
    assert decided(expected)
    assert_same(engine.generate([[4, 9, 1]], params)[0], expected)


# Cases worth seeing by name, whatever hypothesis draws.
@pytest.mark.parametrize(
    "values",
    [
        {"beam_width": 3, "successors": 1, "chunk_length": 2},
        {"beam_width": 1, "successors": 4, "chunk_length": 1},
        {"beam_width": 3, "successors": 3, "chunk_length": 2, "dedup": True, "top_k": 2},
        {"beam_width": 3, "successors": 3, "chunk_length": 2, "dedup": False, "top_k": 2},
        {"beam_width": 2, "successors": 3, "temperature": 0.0},
        {"beam_width": 2, "successors": 3, "temperature": 0.0, "dedup": True, "n": 2},
        {"beam_width": 3, "successors": 2, "chunk_length": 3, "score": "mean", "n": 3},
        {"beam_width": 3, "successors": 2, "chunk_length": 3, "finished": "replicate", "n": 3},
        {"beam_width": 2, "successors": 2, "max_new_tokens": 1, "chunk_length": 5},
        {"beam_width": 2, "successors": 2, "max_new_tokens": 7, "chunk_length": 7},
        {"beam_width": 2, "successors": 2, "max_new_tokens": 7, "chunk_length": 6},
        {"method": "bon", "successors": 1},
        {"method": "bon", "successors": 5, "dedup": True, "n": 5, "top_k": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("eos", [(0,), (1, 4, 8, 11)], ids=["rare eos", "frequent eos"])
def test_named_cases_find_what_the_reference_finds(
    values: dict[str, Any], eos: tuple[int, ...]
) -> None:
    engine, reference = engine_and_reference("llama", eos, (1.0,))
    for seed in (0, 1):
        params = SearchParams(**{"max_new_tokens": 12, **values}, seed=seed, trace=True)
        expected = reference.search([6, 2], params)
        assert decided(expected)
        assert_same(engine.generate([[6, 2]], params)[0], expected)
