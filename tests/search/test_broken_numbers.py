"""NaN, infinity and exceptions out of a model are named, and touch one request alone."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from tests.support.broken_models import broken_triple, failing
from tests.support.engines import (
    MIXED,
    PROMPTS,
    SEARCH,
    assert_all_pages_free,
    engine,
    found,
    make_engine,
)
from tests.support.tiny_models import (
    tiny_triple,
)
from w2s_fast import Engine, Guide, SearchParams, SearchResult
from w2s_fast.errors import (
    EngineFailure,
    InvalidRequest,
    NumericalError,
)
from w2s_fast.models import PagedModel

SEARCHED = SearchParams(beam_width=2, successors=2, chunk_length=2, max_new_tokens=6, trace=True)
FUSED = replace(SEARCHED, proposal="fusion")


@pytest.mark.parametrize("params", [SEARCHED, FUSED], ids=["searched", "fused"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["base", "tuned", "untuned"])
def test_nan_in_a_model_fails_the_requests_it_touches_and_no_others(
    which: str, value: float, params: SearchParams
) -> None:
    token = 7
    triple = tiny_triple(("llama", "llama", "llama"), eos=(0,), dtype=torch.float32)
    good = make_engine(*triple)
    bad = make_engine(*broken_triple(triple, which, token, value))
    prompts = [[i, 3] for i in range(12)] + [[7, 7, 7], [1, 7, 2], [19]]
    expected = good.generate(prompts, params)
    results = bad.generate(prompts, params, on_error="return")
    failed = clean = 0
    for prompt, result, good_result in zip(prompts, results, expected, strict=True):
        assert good_result.trace is not None
        sampled = {t for r in good_result.trace.rounds for c in r.candidates for t in c.token_ids}
        if token in prompt:
            assert isinstance(result.error, NumericalError)
            assert which in str(result.error)
            assert result.finish_reason == "error"
            assert result.hypotheses == []
            failed += 1
        elif token not in sampled:
            assert found([result]) == found([good_result])
            clean += 1
    assert failed == 3
    assert clean >= 3
    assert_all_pages_free(bad)
    with pytest.raises(NumericalError) as caught:
        bad.generate(prompts, params)
    assert caught.value.results is not None
    assert [r.error is None for r in caught.value.results] == [r.error is None for r in results]
    assert found(bad.generate([[19]], params)) == found([expected[-1]])  # it goes on serving


def newcomer(result: SearchResult, prompt: list[int]) -> int | None:
    """A token of a kept hypothesis that is in no candidate of the first two rounds."""
    assert result.trace is not None
    rounds = result.trace.rounds
    early = {t for r in rounds[:2] for c in r.candidates for t in c.token_ids} | set(prompt)
    late = [t for i in rounds[2].kept for t in rounds[2].candidates[i].token_ids]
    return next((t for t in late if t not in early), None)


@pytest.mark.parametrize("which", ["base", "tuned", "untuned"])
def test_a_model_that_turns_nan_in_mid_search_names_itself_and_harms_no_neighbour(
    which: str,
) -> None:
    triple = tiny_triple(("llama", "llama", "llama"), eos=(), dtype=torch.float32)
    good = make_engine(*triple)
    params = [
        SearchParams(
            beam_width=2, successors=2, chunk_length=1, max_new_tokens=8, seed=i, trace=True
        )
        for i in range(12)
    ]
    prompts = [[2]] * 12
    expected = good.generate(prompts, params)
    token = next(t for r in expected if (t := newcomer(r, [2])) is not None)
    bad = make_engine(*broken_triple(triple, which, token, math.nan))
    results = bad.generate(prompts, params, on_error="return")
    assert sum(r.error is not None for r in results) >= 1
    for result, good_result in zip(results, expected, strict=True):
        assert good_result.trace is not None
        fed = {
            t for r in good_result.trace.rounds[:-1] for i in r.kept
            for t in r.candidates[i].token_ids
        }  # fmt: skip
        assert (result.error is not None) == (token in fed)
        if result.error is not None:
            assert isinstance(result.error, NumericalError)
            assert which in str(result.error)
            assert any(f"position {i} " in str(result.error) for i in range(1, 8))
        else:
            assert found([result]) == found([good_result])
    assert_all_pages_free(bad)


@pytest.mark.parametrize("which", ["tuned", "untuned"])
def test_a_given_text_that_a_model_cannot_score_is_refused_with_the_models_name(which: str) -> None:
    token = 7
    triple = tiny_triple(("gpt2", "llama", "llama"), eos=())
    engine = make_engine(*broken_triple(triple, which, token, math.nan))
    with pytest.raises(NumericalError, match=rf"'{which}' .* at position \d of the response"):
        engine.score([[1, 2], [1, 2]], [[3, 4, 5], [3, 4, token, 5]])
    (score,) = engine.score([[1, 2]], [[3, 4, 5]])
    assert math.isfinite(score)
    assert_all_pages_free(engine)


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf, "1", None])
def test_a_weight_that_is_no_finite_number_is_refused_by_name(weight: Any) -> None:
    base, tuned, untuned = tiny_triple()
    with pytest.raises(InvalidRequest, match="weight"):
        Engine(base, Guide(tuned, untuned, weight=weight), device="cpu", kv_cache_tokens=512)


@pytest.mark.parametrize("call", range(1, 8))
@pytest.mark.parametrize("which", [0, 1, 2], ids=["base", "tuned", "untuned"])
def test_an_exception_out_of_a_model_leaves_no_page_behind(which: int, call: int) -> None:
    triple = tiny_triple(eos=(0, 6, 13))
    e = make_engine(*triple)
    with (
        failing(triple[which], call, MemoryError("for the test")),
        pytest.raises(EngineFailure, match="MemoryError: for the test") as raised,
    ):
        e.generate(PROMPTS, replace(SEARCH, chunk_length=1))
    assert isinstance(raised.value.__cause__, MemoryError)
    assert_all_pages_free(e)
    assert found(e.generate(PROMPTS, MIXED)) == found(engine().generate(PROMPTS, MIXED))


def logits_with(value: float, token: int) -> Any:
    """PagedModel.logits, with this value for a token of the model named ``untuned``."""
    inner = PagedModel.logits

    def logits(self: PagedModel, hidden: torch.Tensor) -> torch.Tensor:
        found = inner(self, hidden)
        if self.name == "untuned":
            found = found.clone()
            found[:, token] = value
        return found

    return mock.patch.object(PagedModel, "logits", logits)


def test_a_sum_of_sound_logits_that_is_not_finite_is_named() -> None:
    """What one guide's model forbids, and the other does not, would be drawn for certain."""
    made = make_engine(*tiny_triple(eos=()))
    params = SearchParams(method="fusion", max_new_tokens=6, ignore_eos=True)
    with logits_with(-math.inf, 5):
        (result,) = made.generate([[1, 2]], params, on_error="return")
        # Against the guides it is never drawn.
        (against,) = made.generate([[1, 2]], replace(params, beta=-1.0), on_error="return")
    assert isinstance(result.error, NumericalError)
    assert "'base and guides, fused' gave NaN or infinity at position 0" in str(result.error)
    assert against.error is None and 5 not in against.token_ids
    assert_all_pages_free(made)


def test_a_token_that_all_guides_forbid_is_the_bases_to_draw() -> None:
    """-inf minus -inf counts as 0, in the fused logits and in the score."""
    models = tiny_triple(eos=())
    made = make_engine(*models)
    plain = make_engine(*models)
    params = SearchParams(method="fusion", max_new_tokens=6, beta=0.0, n=4, ignore_eos=True)
    wanted = plain.generate([[1, 2]], params)
    token = wanted[0].token_ids[0]
    inner = PagedModel.logits

    def logits(self: PagedModel, hidden: torch.Tensor) -> torch.Tensor:
        found = inner(self, hidden)
        if self.name != "base":
            found = found.clone()
            found[:, token] = -math.inf
        return found

    with mock.patch.object(PagedModel, "logits", logits):
        (result,) = made.generate([[1, 2]], replace(params, beta=1.0), on_error="return")
        (same,) = made.generate([[1, 2]], params)
    assert result.error is None
    assert [h.token_ids for h in same.hypotheses] == [h.token_ids for h in wanted[0].hypotheses]
    first = same.hypotheses[0]
    assert first.token_ids[0] == token and first.token_scores[0] == 0
