"""Guides of other vocabularies score what candidates say, as if each text were scored anew."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch

from tests.support.engines import assert_all_pages_free, found
from tests.support.tiny_models import tiny_model
from tests.support.trained_tokenizers import trained
from w2s_fast import Engine, Guide, SearchParams
from w2s_fast.result import Candidate

SEARCH = SearchParams(
    beam_width=3, successors=2, chunk_length=4, max_new_tokens=14, trace=True, seed=5
)
PROMPTS = ["the film was a", "hello world", "\u4eca\u5929 it's", "x"]


def model_of(tokenizer: Any, seed: int, family: str = "llama") -> Any:
    return tiny_model(
        family,
        seed=seed,
        vocab_size=len(tokenizer),
        eos=(tokenizer.eos_token_id,),
        bos=tokenizer.bos_token_id,
        dtype=torch.float64,
    )


@cache
def pair(kind: str, seed: int = 1, weight: float = 1.0) -> Guide:
    tokenizer = trained(kind)
    return Guide(
        model_of(tokenizer, seed), model_of(tokenizer, seed + 1), weight, tokenizer=tokenizer
    )


@cache
def engine(base: str, *guides: str, **options: Any) -> Engine:
    tokenizer = trained(base)
    own = [pair(kind, 1 + 2 * i, 1.0 - 0.25 * i) for i, kind in enumerate(guides)]
    return Engine(
        model_of(tokenizer, 0),
        own,
        tokenizer=tokenizer,
        kv_cache_tokens=4096,
        page_size=4,
        **options,
    )


def anew(guide: Guide, prompt: str, text: str, ends: bool) -> float:
    """A guide's score of a text, from a pass over all of it."""
    tokenizer = guide.tokenizer
    assert tokenizer is not None

    def ids(of: str) -> list[int]:
        read = tokenizer(of)["input_ids"]
        return read[:-1] if read[-1:] == [tokenizer.eos_token_id] else read

    before, both = ids(prompt), ids(prompt + text)
    start = 0
    while start < min(len(before), len(both)) and before[start] == both[start]:
        start += 1
    both = both + [tokenizer.eos_token_id] * ends
    totals = []
    for model in (guide.tuned, guide.untuned):
        with torch.no_grad():
            logits = model(torch.tensor([both])).logits[0, start - 1 : -1].double()
        targets = torch.tensor(both[start:])
        totals.append(float(logits.log_softmax(-1).gather(1, targets[:, None]).sum()))
    return guide.weight * (totals[0] - totals[1])


def said(e: Engine, prompt: str, candidate: Candidate) -> tuple[str, bool]:
    """What a candidate says, as far as it is certain, and whether an EOS ends it."""
    ids, ends = list(candidate.token_ids), candidate.finish_reason == "eos"
    if ends:
        ids.pop()
    assert e.tokenizer is not None
    before = e.tokenizer(prompt)["input_ids"][-8:]
    text = e.tokenizer.decode([*before, *ids], skip_special_tokens=True)
    text = text[len(e.tokenizer.decode(before, skip_special_tokens=True)) :]
    return (text if candidate.finish_reason else text.rstrip("\ufffd")), ends


def check(e: Engine, guides: Sequence[Guide], prompt: str, result: Any, mean: bool = False) -> None:
    assert result.trace is not None and result.trace.rounds
    for number in result.trace.rounds:
        scores = []
        for candidate in number.candidates:
            text, ends = said(e, prompt, candidate)
            score = sum(anew(guide, prompt, text, ends) for guide in guides)
            scores.append(score / len(candidate.token_ids) if mean else score)
        assert [c.score for c in number.candidates] == pytest.approx(scores, abs=1e-4)
        ranked = sorted(range(len(scores)), key=lambda c: -number.candidates[c].score)
        assert number.kept == ranked[: len(number.kept)]


@pytest.mark.parametrize("kind", ["bpe-first", "unigram-bytes", "wordpiece", "bytes-llama3"])
def test_scores_are_those_of_whole_texts(kind: str) -> None:
    e = engine("bytes-gpt2", kind)
    for prompt, result in zip(PROMPTS, e.generate(PROMPTS, SEARCH, progress=False)):
        check(e, [pair(kind)], prompt, result)
    assert_all_pages_free(e)
    assert found([e.generate([p], SEARCH)[0] for p in PROMPTS]) == found(
        e.generate(PROMPTS, SEARCH, progress=False)
    )
