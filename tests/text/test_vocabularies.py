"""One vocabulary for all models: padding is never sampled, other vocabularies are refused."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.engines import (
    PROMPTS,
    make_engine,
)
from tests.support.reference import Reference, ReferenceGuide, forward, log_softmax
from tests.support.results import assert_same
from tests.support.tiny_models import (
    BYTE_VOCABULARY,
    byte_tokenizer,
    save_tiny,
    tiny_model,
)
from tests.support.tokenizers import with_gaps
from w2s_fast import Engine, Guide, SearchParams
from w2s_fast.errors import (
    InvalidRequest,
    MismatchedVocabulary,
)


@pytest.mark.parametrize(("base_width", "guide_width"), [(20, 27), (27, 20), (24, 21)])
def test_padded_ids_are_never_sampled_and_never_scored(base_width: int, guide_width: int) -> None:
    shared = min(base_width, guide_width)
    base = copy.deepcopy(tiny_model("llama", vocab_size=base_width, eos=(0,)))
    tuned, untuned = (
        copy.deepcopy(tiny_model("phi3", vocab_size=guide_width, seed=s)) for s in (1, 2)
    )
    for model in (base, tuned, untuned):  # whatever stands there
        model.get_output_embeddings().weight.data[shared:] *= 20
    tuned.get_output_embeddings().weight.data[shared:] = math.nan
    e = make_engine(base, tuned, untuned)
    reference = Reference(
        base, [ReferenceGuide(tuned, untuned)], vocab_size=shared, eos_token_ids=[0]
    )
    params = SearchParams(
        temperature=2.0, top_k=0, beam_width=2, successors=3, chunk_length=4, max_new_tokens=12,
        trace=True,
    )  # fmt: skip
    for prompt in PROMPTS:
        result = e.generate([prompt], params)[0]
        assert_same(result, reference.search(prompt, params))
        assert max(h for h in result.token_ids) < shared
    with pytest.raises(InvalidRequest, match=str(shared)):
        e.generate([[shared]], params)


def test_ids_that_the_tokenizer_does_not_know_are_never_sampled(path_engine: Engine) -> None:
    params = SearchParams(
        method="sample", n=60, max_new_tokens=40, temperature=5.0, top_k=0, ignore_eos=True
    )
    (result,) = path_engine.generate(["a"], params)
    sampled = {t for h in result.hypotheses for t in h.token_ids}
    assert max(sampled) == BYTE_VOCABULARY - 1
    assert len(sampled) > 250


GAPS = (5, 70, 200)


class GappedReference(Reference):
    """Its models give the gaps no probability; else it is the same arithmetic."""

    def next_logits(self, token_ids: list[int]) -> np.ndarray:
        return without_gaps(super().next_logits(token_ids))

    def token_scores(self, prompts: list[list[int]], response: list[int]) -> list[float]:
        scores = []
        for t, token in enumerate(response):
            tuned, untuned = (
                log_softmax(without_gaps(forward(m, [*prompts[0], *response[:t]], 258)[-1]))[token]
                for m in (self.guides[0].tuned, self.guides[0].untuned)
            )
            scores.append(float(tuned - untuned))
        return scores


def without_gaps(logits: np.ndarray) -> np.ndarray:
    logits = logits.copy()
    logits[list(GAPS)] = -np.inf
    return logits


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # gemma's logits have a soft cap
def test_ids_in_gaps_of_the_vocabulary_are_never_sampled_and_never_scored(family: str) -> None:
    base, tuned, untuned = (
        copy.deepcopy(tiny_model(f, seed=s, vocab_size=258, eos=(257,)))
        for s, f in enumerate((family, family, "phi3"))
    )
    for model in (base, tuned, untuned):  # they would win
        model.get_output_embeddings().weight.data[list(GAPS)] *= 20
    if family == "llama":
        tuned.get_output_embeddings().weight.data[list(GAPS)] = math.nan
    tokenizer = with_gaps(byte_tokenizer(), *GAPS)
    e = make_engine(base, tuned, untuned, tokenizer=tokenizer)
    reference = GappedReference(
        base, [ReferenceGuide(tuned, untuned)], vocab_size=258, eos_token_ids=[257]
    )
    params = SearchParams(
        temperature=1.5, top_k=0, beam_width=2, successors=2, chunk_length=3, max_new_tokens=6,
        trace=True,
    )  # fmt: skip
    result = e.generate([PROMPTS[0]], params)[0]
    tokens_only = [replace(h, text=None) for h in result.hypotheses]
    assert_same(replace(result, hypotheses=tokens_only), reference.search(PROMPTS[0], params))
    greedy = SearchParams(method="sample", temperature=0, max_new_tokens=20)
    assert not set(GAPS) & set(e.generate([PROMPTS[0]], greedy)[0].token_ids)


def with_swapped_tokens() -> Any:
    tokenizer = byte_tokenizer()
    text = tokenizer.backend_tokenizer.to_str()
    from tokenizers import Tokenizer

    changed = text.replace('"a":', '"\u0000":').replace('"b":', '"a":').replace('"\u0000":', '"b":')
    assert changed != text
    tokenizer._tokenizer = Tokenizer.from_str(changed)
    return tokenizer


@pytest.mark.parametrize("which", ["tuned", "untuned"])
@pytest.mark.parametrize("kind", ["two tokens swapped", "other special tokens", "too few logits"])
def test_a_guide_with_another_vocabulary_is_refused_by_name(
    which: str, kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    if kind == "two tokens swapped":
        wrong = save_tiny(tmp_path / "w", "gpt2", tokenizer=with_swapped_tokens())
    elif kind == "other special tokens":
        wrong = save_tiny(tmp_path / "w", "gpt2", tokenizer=byte_tokenizer(bos=None))
    else:
        wrong = save_tiny(tmp_path / "w", "gpt2", vocab_size=200, eos=(0,), bos=1)
    guides = {"tuned": folders["tuned"], "untuned": folders["untuned"], which: wrong}
    with pytest.raises(MismatchedVocabulary) as caught:
        Engine(base=str(folders["base"]), guides=Guide(**guides), device="cpu", kv_cache_tokens=512)
    assert str(caught.value).startswith(which)
