"""Engines under guides of other vocabularies, and what passes over whole texts say of results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from tests.support.probed import probed_once
from tests.support.tiny_models import tiny_model
from tests.support.trained_tokenizers import trained
from w2s_fast import Engine, Guide, SearchParams, SearchResult
from w2s_fast.result import Candidate, Round

LAST = "\ufffd"  # for bytes of a character that is not whole
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


ENDS = tuple(range(9, 600, 12))  # tokens that end a response, so that some do


def make(base: str, guides: Sequence[Guide], ends: Sequence[int] = ENDS, **options: Any) -> Engine:
    tokenizer = trained(base)
    eos = tuple(i for i in ends if i < len(tokenizer))
    model = tiny_model(
        seed=0, vocab_size=len(tokenizer), eos=eos or (tokenizer.eos_token_id,), bos=None
    )
    options = {"kv_cache_tokens": 4096, "page_size": 4, "device": "cpu", **options}
    with probed_once():
        return Engine(model, guides, tokenizer=tokenizer, **options)


@cache
def engine(base: str, *guides: str) -> Engine:
    return make(base, pairs(*guides))


def pairs(*kinds: str) -> list[Guide]:
    return [pair(kind, 1 + 2 * i, 1.0 - 0.25 * i) for i, kind in enumerate(kinds)]


def anew(guide: Guide, prompt: str, text: str, ends: bool) -> float:
    """A guide's score of a text, from a pass over all of it."""
    tokenizer = guide.tokenizer
    assert tokenizer is not None
    before, both = ids_of(tokenizer, prompt), ids_of(tokenizer, prompt + text)
    models = [model for model in (guide.tuned, guide.untuned) if model is not None]
    tuned, *untuned = (total(model, tokenizer, before, both, ends) for model in models)
    return guide.weight * (tuned - sum(untuned))


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """Of a text that goes on: without an EOS that the tokenizer puts behind it."""
    ids: list[int] = tokenizer(text, split_special_tokens=True)["input_ids"]
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids


def total(model: Any, tokenizer: Any, before: list[int], both: list[int], ends: bool) -> float:
    """The log-prob of what comes behind what both have in common, and of an EOS."""
    start = 0
    while start < min(len(before), len(both)) and before[start] == both[start]:
        start += 1
    assert start > 0
    both = both + [tokenizer.eos_token_id] * ends
    with torch.no_grad():
        logits = model(torch.tensor([both])).logits[0, start - 1 : -1].double()
    targets = torch.tensor(both[start:], dtype=torch.int64)
    return float(logits.log_softmax(-1).gather(1, targets[:, None]).sum())


def said_raw(e: Engine, prompt: str, candidate: Candidate) -> str:
    """What a candidate says, with marks for the bytes of a character that is not whole."""
    ids = list(candidate.token_ids)
    if candidate.finish_reason == "eos":
        ids.pop()
    assert e.tokenizer is not None
    before = e.tokenizer(prompt)["input_ids"][-8:]
    text = e.tokenizer.decode([*before, *ids], skip_special_tokens=True)
    return str(text[len(e.tokenizer.decode(before, skip_special_tokens=True)) :])


def said(e: Engine, prompt: str, candidate: Candidate) -> tuple[str, bool]:
    """What a candidate says, as far as it is certain, and whether an EOS ends it."""
    ids, run = list(candidate.token_ids), b""
    assert e.tokenizer is not None
    names = e.tokenizer.convert_ids_to_tokens(ids)
    while candidate.finish_reason is None and names and names[-1].startswith("<0x"):
        run = bytes([int(names.pop()[3:5], 16)]) + run
    text = said_raw(e, prompt, replace(candidate, token_ids=ids[: len(names)]))
    if candidate.finish_reason is None:
        text = text.rstrip(LAST)
    for length in range(len(run), 0, -1):  # what is whole of a run of bytes
        try:
            return text + run[:length].decode(), False
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data":
                break
    return text, candidate.finish_reason == "eos"


def rounds(result: SearchResult) -> list[Round]:
    assert result.trace is not None
    return result.trace.rounds


def check(
    e: Engine,
    guides: Sequence[Guide],
    prompt: str,
    result: SearchResult,
    mean: bool = False,
    ranks: bool = True,
) -> None:
    """That all candidates have the scores of their whole texts, and the best were kept."""
    assert rounds(result)
    for number in rounds(result):
        scores = []
        for candidate in number.candidates:
            text, ends = said(e, prompt, candidate)
            score = sum(anew(guide, prompt, text, ends) for guide in guides)
            scores.append(score / len(candidate.token_ids) if mean else score)
        assert [c.score for c in number.candidates] == pytest.approx(scores, abs=1e-4)
        if ranks:
            ranked = sorted(range(len(scores)), key=lambda c: -(number.candidates[c].score or 0.0))
            assert number.kept == ranked[: len(number.kept)]
