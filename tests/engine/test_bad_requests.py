"""Prompts, parameters and engines that are refused, each by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.support.engines import (
    SEARCH,
    assert_all_pages_free,
    engine,
    found,
    make_engine,
)
from tests.support.tiny_models import (
    MAX_POSITIONS,
    VOCABULARY,
    tiny_model,
)
from w2s_fast import Engine, Guide, SearchParams
from w2s_fast.errors import (
    InvalidRequest,
    UnsupportedModel,
    W2SFastError,
)


def test_an_empty_prompt_starts_from_bos() -> None:
    empty, bos = engine().generate([[], [1]], SEARCH)
    assert found([empty]) == found([bos])
    assert empty.usage.prompt_tokens == 1


@pytest.mark.parametrize("which", ["base", "tuned"])
def test_an_empty_prompt_of_a_model_without_bos_is_refused(which: str) -> None:
    triple = [
        tiny_model(f, seed=s, bos=None if name == which else 1)
        for s, (name, f) in enumerate([("base", "llama"), ("tuned", "gpt2"), ("untuned", "gpt2")])
    ]
    e = make_engine(*triple)
    with pytest.raises(InvalidRequest, match=rf"{which}.*BOS"):
        e.generate([[]], SEARCH)
    assert e.generate([[2]], SEARCH)[0].error is None


BAD_PROMPTS: dict[str, tuple[Any, str]] = {
    "id beyond the vocabulary": ([1, VOCABULARY], "20"),
    "negative id": ([1, -1], "-1"),
    "a float": ([1, 2.0], "2.0"),
    "a bool": ([True], "True"),
    "nothing": (None, "NoneType"),
    "a number": (5, "int"),
    "bytes": (b"abc", "bytes"),
    "text without a tokenizer": ("abc", "tokenizer"),
    "messages without a tokenizer": ([{"role": "user", "content": "a"}], "tokenizer"),
    "too long": ([1] * MAX_POSITIONS, str(MAX_POSITIONS)),
    "too long with its response": ([1] * (MAX_POSITIONS - 10), str(MAX_POSITIONS)),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_a_bad_prompt_is_refused_with_the_reason_and_harms_no_neighbour(name: str) -> None:
    prompt, reason = BAD_PROMPTS[name]
    e = engine()
    with pytest.raises(InvalidRequest, match=reason) as caught:
        e.generate([[1, 2], prompt, [3]], SEARCH)
    assert caught.value.results is not None
    first, bad, last = caught.value.results
    assert bad.error is caught.value
    assert bad.finish_reason == "error"
    assert found([first, last]) == found(e.generate([[1, 2], [3]], SEARCH))
    assert_all_pages_free(e)


def test_a_prompt_as_long_as_fits_is_served_to_its_end() -> None:
    e = engine(eos=(), page_size=16)
    prompt = [i % VOCABULARY for i in range(MAX_POSITIONS - SEARCH.max_new_tokens)]
    (result,) = e.generate([prompt], SEARCH)
    assert len(result.token_ids) == SEARCH.max_new_tokens


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ([SEARCH], "params"),
        ([SEARCH] * 3, "params"),
        ({"beam_width": 2}, "params"),
        ([SEARCH, None], "params"),
        (SearchParams(stop_token_ids=[VOCABULARY]), "stop_token_ids"),
    ],
    ids=["too few", "too many", "a dict", "a hole", "a stop token beyond the vocabulary"],
)
def test_params_that_do_not_fit_the_prompts_are_refused(params: Any, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        engine().generate([[1], [2]], params)
    assert_all_pages_free(engine())


@pytest.mark.parametrize(
    "values",
    [
        {"top_k": 2**62},
        {"top_k": 2**63},
        {"top_k": 10**30},
        {"temperature": 1e39},
        {"temperature": 1e-50},
        {"temperature": 10**400},
        {"min_p": 1e-320},
        {"top_p": 5e-324},
        {"beam_width": 10**12},
        {"successors": 10**12},
        {"max_new_tokens": 10**30},
        {"chunk_length": 10**30},
        {"method": "sample", "n": 10**9},
        {"stop_token_ids": [10**30]},
    ],
    ids=str,
)
def test_values_beyond_all_measure_are_served_or_refused_and_harm_no_neighbour(
    values: dict[str, Any],
) -> None:
    try:
        params = SearchParams(**{"max_new_tokens": 4, **values})
    except InvalidRequest:
        return
    small = replace(SEARCH, max_new_tokens=4)
    results = engine().generate([[1], [2], [3]], [small, params, small], on_error="return")
    assert results[1].error is None or isinstance(results[1].error, InvalidRequest)
    assert found([results[0], results[2]]) == found(engine().generate([[1], [3]], small))
    assert_all_pages_free(engine())


def test_a_search_needs_guides_and_a_sample_does_not() -> None:
    e = Engine(base=tiny_model("llama"), device="cpu", kv_cache_tokens=1024)
    for params in (SearchParams(), SearchParams(method="bon")):
        with pytest.raises(InvalidRequest, match="guide"):
            e.generate([[1]], params)
    with pytest.raises(InvalidRequest, match="guide"):
        e.score([[1]], [[2]])
    single = SearchParams(beam_width=1, successors=1, max_new_tokens=4)
    for params in (SearchParams(method="sample", n=2, max_new_tokens=4), single):
        assert e.generate([[1]], params)[0].score is None


def test_no_prompts_give_no_results() -> None:
    assert engine().generate([], SEARCH) == []
    assert engine().generate([], []) == []


@pytest.mark.parametrize("name", ["page_size", "max_rows", "kv_cache_tokens"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "4", True])
def test_a_bad_size_of_the_engine_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=name):
        Engine(base=tiny_model("llama"), device="cpu", **{name: value})


@pytest.mark.parametrize(
    ("which", "source"),
    [("base", None), ("base", 3), ("tuned", None), ("tuned", ["gpt2"]), ("untuned", 3)],
)
def test_what_is_no_model_is_refused_by_name(which: str, source: Any) -> None:
    tiny = tiny_model("llama")
    named = {"base": tiny, "tuned": tiny, "untuned": tiny, which: source}
    guide = Guide(named["tuned"], named["untuned"])
    with pytest.raises(InvalidRequest, match="allowed: a path, a hub id, or a loaded model"):
        Engine(named["base"], guide, device="cpu", kv_cache_tokens=256)


@pytest.mark.parametrize("guides", [[tiny_model("llama")], "gpt2", [None], 3])
def test_what_is_no_guide_is_refused_by_name(guides: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"a guide is of type \w+; allowed: a Guide"):
        Engine(tiny_model("llama"), guides, device="cpu", kv_cache_tokens=256)


@pytest.mark.parametrize("source", ["/no/such/folder", "", "./nowhere"])
def test_a_model_that_is_not_there_is_refused_by_name(source: str) -> None:
    with pytest.raises(UnsupportedModel, match=source or "empty"):
        Engine(base=source, device="cpu", kv_cache_tokens=256)


@pytest.mark.parametrize("tokens", [1, 3, 8, 20, 30])
@pytest.mark.parametrize("page_size", [1, 16])
def test_a_cache_too_small_for_anything_is_refused_by_name_or_serves_what_fits(
    tokens: int, page_size: int
) -> None:
    single = SearchParams(method="sample", max_new_tokens=1)
    message, results = None, []
    try:
        e = Engine(
            base=tiny_model("llama", layers=1),
            device="cpu",
            kv_cache_tokens=tokens,
            page_size=page_size,
        )
        results = e.generate([[1]], single)
    except W2SFastError as error:
        message = str(error)
    if message is None:
        assert found(results) == found(engine().generate([[1]], single))
    else:
        assert "kv_cache_tokens" in message
