"""Guides of other vocabularies where something changes, breaks, is given up, or cannot be."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.broken_models import broken_copy, failing
from tests.support.engines import assert_all_pages_free, found
from tests.support.foreign_guides import PROMPTS, SEARCH, check, engine, make, model_of, pairs
from tests.support.tiny_models import tiny_model
from tests.support.trained_tokenizers import trained
from w2s_fast import Engine, Guide, SearchParams
from w2s_fast.errors import (
    EngineFailure,
    InvalidRequest,
    MismatchedVocabulary,
    NumericalError,
)


def test_changed_weights_of_a_guide_are_followed() -> None:
    tokenizer = trained("bpe-first")
    tuned = copy.deepcopy(model_of(tokenizer, 1))
    guide = Guide(tuned, model_of(tokenizer, 2), tokenizer=tokenizer)
    e = make("bytes-gpt2", [guide])
    e.generate(PROMPTS, SEARCH, progress=False)
    with torch.no_grad():
        tuned.get_output_embeddings().weight.mul_(-1.0)
    for prompt, result in zip(PROMPTS, e.generate(PROMPTS, SEARCH, progress=False), strict=True):
        check(e, [guide], prompt, result)


def test_weights_that_change_meanwhile() -> None:
    tokenizer = trained("bpe-first")
    tuned = copy.deepcopy(model_of(tokenizer, 1))
    e = make("bytes-gpt2", [Guide(tuned, model_of(tokenizer, 2), tokenizer=tokenizer)], ends=())
    short = SearchParams(**{**vars(SEARCH), "max_new_tokens": 4, "trace": False})
    for index, result in e.as_completed(PROMPTS, [SEARCH, short, SEARCH, SEARCH]):
        assert result.error is None
        if index == 1:
            with torch.no_grad():
                tuned.get_output_embeddings().weight.mul_(-1.0)
    assert_all_pages_free(e)


def test_broken_numbers_end_the_request_alone() -> None:
    tokenizer = trained("bpe-first")
    token = tokenizer.convert_tokens_to_ids("\u2581world")
    broken = broken_copy(model_of(tokenizer, 1), token, float("nan"))
    e = make("bytes-gpt2", [Guide(broken, model_of(tokenizer, 2), tokenizer=tokenizer)])
    failed, fine = e.generate(["hello world", "x"], SEARCH, progress=False, on_error="return")
    assert isinstance(failed.error, NumericalError)
    assert "tuned" in str(failed.error)
    assert fine.error is None
    assert_all_pages_free(e)


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("call", [1, 2, 4])
def test_an_interrupted_step_leaves_nothing_behind(call: int, error: BaseException) -> None:
    guides = pairs("bpe-first")
    e = make("bytes-gpt2", guides)
    expected = found(e.generate(PROMPTS, SEARCH, progress=False))
    broken = failing(guides[0].untuned, call, error)  # type: ignore[arg-type]
    with broken, pytest.raises((EngineFailure, KeyboardInterrupt)):
        e.generate(PROMPTS, SEARCH, progress=False)
    assert_all_pages_free(e)
    assert found(e.generate(PROMPTS, SEARCH, progress=False)) == expected


def test_requests_that_are_given_up_hold_nothing() -> None:
    e = engine("bytes-gpt2", "bpe-first", "wordpiece")
    for _ in e.as_completed(PROMPTS, SEARCH):
        break
    for prompt in PROMPTS:
        for _ in e.stream(prompt, SEARCH):
            break
    assert_all_pages_free(e)
    assert not e._search.foreign._of


def test_streams_and_results_agree() -> None:
    e = engine("bytes-gpt2", "bpe-first")
    for prompt in PROMPTS:
        *pieces, last = e.stream(prompt, SEARCH)
        assert "".join(p.text or "" for p in [*pieces, last]) == last.result.text  # type: ignore[union-attr]


def test_tokens_that_were_run_are_counted() -> None:
    e = make("bytes-gpt2", pairs("bpe-first"), ends=())
    result = e.generate(["the film"], SEARCH, progress=False)[0]
    foreign = e._search.foreign
    assert foreign.run_tokens[0] == foreign.run_tokens[1] == result.usage.scored_tokens > 0
    assert e.stats().scored_tokens == result.usage.scored_tokens


@pytest.mark.parametrize("method", ["fusion", "dynamic_fusion"])
def test_fusion_needs_one_vocabulary_and_says_so(method: Any) -> None:
    e = engine("bytes-gpt2", "bpe-first")
    with pytest.raises(InvalidRequest, match=r"one vocabulary: tuned .* another vocabulary"):
        e.generate(["the"], SearchParams(method=method), progress=False)
    with pytest.raises(InvalidRequest, match="one vocabulary"):
        e.generate(["the"], SearchParams(proposal="fusion"), progress=False)
    e.generate(["the"], SearchParams(method="sample", max_new_tokens=2), progress=False)


def test_models_of_a_guide_share_a_vocabulary(tmp_path: Path) -> None:
    base = trained("bytes-gpt2")
    model = tiny_model(seed=0, vocab_size=len(base), bos=None)
    for name, kind in (("one", "bpe-first"), ("other", "wordpiece"), ("same", "bytes-gpt2")):
        own = trained(kind)
        model_of(own, 1).save_pretrained(tmp_path / name)
        own.save_pretrained(tmp_path / name)
    one, other, same = (str(tmp_path / name) for name in ("one", "other", "same"))
    for guide in (Guide(one, other), Guide(one, same), Guide(same, other)):
        with pytest.raises(MismatchedVocabulary):
            Engine(model, guide, tokenizer=base, device="cpu", kv_cache_tokens=512)
    with pytest.raises(MismatchedVocabulary, match="cannot be told"):
        Engine(copy.deepcopy(model), Guide(one, one), device="cpu", kv_cache_tokens=512)
    # Tokenizers that lie with the models: read from two files, they are one.
    e = Engine(model, Guide(one, one), tokenizer=base, device="cpu", kv_cache_tokens=512)
    assert e._models.foreign is not None
    e = Engine(model, Guide(same, same), tokenizer=base, device="cpu", kv_cache_tokens=512)
    assert e._models.foreign is None
