"""One vocabulary for all models: padding is never sampled, other vocabularies are refused."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest

from tests.support.engines import (
    PROMPTS,
    make_engine,
)
from tests.support.reference import Reference, ReferenceGuide
from tests.support.results import assert_same
from tests.support.tiny_models import (
    BYTE_VOCABULARY,
    byte_tokenizer,
    save_tiny,
    tiny_model,
)
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
