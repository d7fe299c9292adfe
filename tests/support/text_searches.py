"""Searches whose texts end by strings, in engines and in the naive reference."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import assume

from tests.support.engines import make_engine
from tests.support.recorder import set_up_as_on_cuda
from tests.support.reference import Reference, ReferenceGuide, ReferenceHypothesis
from tests.support.results import decided
from tests.support.tiny_models import VOCABULARY, tiny_triple
from tests.support.tokenizers import syllables
from w2s_fast import Engine, SearchParams, SearchResult
from w2s_fast.scorer import ScoredCandidate
from w2s_fast.text import decode_response

EOS = (0, 6)
STOPS = ["ab", "bc a", "aab", "c\n", "cab", "x", "bb", "\n\n", "a a", "abcabcabc", "<eos>", "cc"]


@functools.cache
def tokenizer() -> Any:
    return syllables(VOCABULARY)


@functools.cache
def engine(ahead: bool = False) -> Engine:
    """``ahead``: as on a GPU, where steps are launched before what they draw is read."""
    triple = tiny_triple(eos=EOS)
    if not ahead:
        return make_engine(*triple, tokenizer=tokenizer())
    with set_up_as_on_cuda(lambda _: lambda run: run):
        return make_engine(*triple, tokenizer=tokenizer())


@functools.cache
def crowded() -> Engine:
    """With room for one large request, and no more."""
    options = {"kv_cache_tokens": 240, "prefix_cache": False}
    return make_engine(*tiny_triple(eos=EOS), tokenizer=tokenizer(), **options)


@functools.cache
def valued() -> Engine:
    """With a scorer beside the guides."""

    def score(candidates: Sequence[ScoredCandidate]) -> list[float]:
        return [value_of(list(c.token_ids), c.finished) for c in candidates]

    return make_engine(*tiny_triple(eos=EOS), tokenizer=tokenizer(), scorers=[(score, 0.5)])


def value_of(tokens: list[int], finished: bool) -> float:
    return sum((i + 1) * token % 7 for i, token in enumerate(tokens)) / 9 + finished


@functools.cache
def reference(scored: bool = False) -> Reference:
    """``scored``: of :func:`valued`."""
    triple = tiny_triple(eos=EOS)
    return Reference(
        triple.base,
        [ReferenceGuide(*triple[1:])],
        vocab_size=VOCABULARY,
        eos_token_ids=EOS,
        tokenizer=tokenizer(),
        scorers=[(value_of, 0.5)] if scored else (),
    )


def check(
    prompt: list[int], params: SearchParams, result: SearchResult, scored: bool = False
) -> None:
    """All but the counts: how far a row is drawn behind its end depends on the steps."""
    expected = reference(scored).search(prompt, params)
    assume(decided(expected))
    assert result.error is None and result.trace is not None
    for number, (ours, theirs) in enumerate(zip(result.trace.rounds, expected.rounds, strict=True)):
        for a, b in zip(ours.candidates, theirs.candidates, strict=True):
            assert (a.token_ids, a.parent, a.finish_reason) == (
                b.token_ids, b.parent, b.finish_reason,
            ), number  # fmt: skip
            assert_close(a.score, b.score)
        assert list(ours.kept) == theirs.kept, number
    for h, theirs_h in zip(result.hypotheses, expected.hypotheses, strict=True):
        assert h.token_ids == theirs_h.token_ids and h.finish_reason == theirs_h.finish_reason
        assert h.token_scores == pytest.approx(theirs_h.token_scores, abs=1e-4)
        assert h.token_logprobs == pytest.approx(theirs_h.token_logprobs, abs=1e-4)
        assert_close(h.score, theirs_h.score)
        assert h.text == text_of(prompt, params, theirs_h, h.stop_reason)
    assert result.usage.completion_tokens == expected.completion_tokens


def assert_close(ours: float | None, theirs: float | None) -> None:
    assert ours is theirs if theirs is None else ours == pytest.approx(theirs, abs=1e-4)


def text_of(
    prompt: list[int], params: SearchParams, h: ReferenceHypothesis, reason: str | int | None
) -> str:
    if h.text is not None:
        assert reason in params.stop
        return h.text + str(reason) * params.include_stop_str_in_output
    assert reason == (h.token_ids[-1] if h.finish_reason == "stop" else None)
    shown = h.token_ids
    if h.finish_reason == "eos" or (reason is not None and not params.include_stop_str_in_output):
        shown = shown[:-1]
    return decode_response(tokenizer(), prompt, shown)
