"""Guides that are an adapter and the model it is for: the search finds what merged models find."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.support.adapters import LINEAR, save_adapter, with_adapter
from tests.support.engines import SEARCH, assert_all_pages_free, found
from tests.support.recorder import Recording, set_up_as_on_cuda
from tests.support.tiny_models import byte_tokenizer, save_tiny, tiny_model
from tests.support.trained_tokenizers import trained
from w2s_fast import Engine, Guide, SearchParams, SearchResult
from w2s_fast.errors import MismatchedVocabulary, UnsupportedModel

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning")

PROMPTS = [[p % 18 + 1 for p in range(9 + 5 * i)] for i in range(3)]
ALL = LINEAR["llama"]
METHODS = {
    "cbs": SEARCH,
    "bon": SearchParams(method="bon", successors=5, max_new_tokens=9, seed=3),
    "fusion": SearchParams(method="fusion", beta=0.7, max_new_tokens=9, seed=4),
    "cbs from fused": replace(SEARCH, proposal="fusion"),
}


def models() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A base, and a small model for adapters; float64: no difference decides by rounding."""
    base = tiny_model("gpt2", seed=1, layers=1, dtype=torch.float64)
    return base, tiny_model("llama", seed=2, dtype=torch.float64)


def saved_model() -> PreTrainedModel:
    """What :func:`save_tiny` has saved as "small"."""
    return tiny_model(
        "llama", seed=2, layers=1, vocab_size=258, eos=(257,), bos=256, dtype=torch.float32
    )


def make(base: Any, *guides: Guide, **options: Any) -> Engine:
    options = {"kv_cache_tokens": 4096, "page_size": 4, "device": "cpu", **options}
    return Engine(base=base, guides=list(guides), **options)


def as_on_cuda(base: Any, *guides: Guide, **options: Any) -> Engine:
    with set_up_as_on_cuda(lambda _: Recording):
        return make(base, *guides, max_rows=64, **options)


def merged(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    return with_adapter(model, folder, merge=True)


@pytest.mark.parametrize("how", [make, as_on_cuda], ids=["plain", "recorded"])
@pytest.mark.parametrize("method", METHODS)
def test_a_search_finds_what_merged_weights_find(method: str, how: Any, tmp_path: Path) -> None:
    base, small = models()
    save_adapter(small, tmp_path, target_modules=ALL)
    params = METHODS[method]
    expected = make(base, Guide(tuned=merged(small, tmp_path), untuned=small))
    engine = how(base, Guide(tuned=str(tmp_path), untuned=small))
    tuned, untuned = engine.guides[0].models
    assert tuned.model is untuned.model is small
    for _ in range(3):  # later ones from recordings, and from the prefix cache
        theirs = expected.generate(PROMPTS, params)
        ours = engine.generate(PROMPTS, params)
        assert found(ours) == found(theirs)
        for own, other in zip(ours, theirs):
            assert own.score == pytest.approx(other.score, abs=1e-8)
    assert_all_pages_free(engine)


def test_the_base_may_be_the_untuned_model(tmp_path: Path) -> None:
    base, _ = models()
    save_adapter(base, tmp_path, target_modules=LINEAR["gpt2"])
    for method, params in METHODS.items():
        expected = make(base, Guide(tuned=merged(base, tmp_path), untuned=base))
        engine = make(base, Guide(tuned=tmp_path, untuned=base))
        assert engine.guides[0].models[1] is engine.base, method
        assert found(engine.generate(PROMPTS, params)) == found(expected.generate(PROMPTS, params))


def test_ten_guides_hold_one_model(tmp_path: Path) -> None:
    base, small = models()
    folders = [
        save_adapter(small, tmp_path / str(i), seed=i, size=0.2, target_modules=ALL)
        for i in range(10)
    ]
    weights = [(-1) ** i * 0.5 for i in range(10)]
    engine = make(base, *(Guide(str(f), small, weight=w) for f, w in zip(folders, weights)))
    expected = make(
        base, *(Guide(merged(small, f), small, weight=w) for f, w in zip(folders, weights))
    )
    assert found(engine.generate(PROMPTS, SEARCH)) == found(expected.generate(PROMPTS, SEARCH))
    assert {id(model.model) for guide in engine.guides for model in guide.models} == {id(small)}


def test_what_is_cached_for_one_side_never_serves_the_other(tmp_path: Path) -> None:
    base, small = models()
    responses = [[5, 2, 7, 1]] * 3
    for seed in (0, 1):
        save_adapter(small, tmp_path / str(seed), seed=seed, target_modules=ALL)
    whole = [merged(small, tmp_path / str(seed)) for seed in (0, 1)]
    engine = make(base, Guide(tmp_path / "0", small), Guide(tmp_path / "1", small, weight=-2.0))
    expected = make(base, Guide(whole[0], small), Guide(whole[1], small, weight=-2.0))
    for _ in range(2):  # the second time prompts are in the prefix cache
        scores = engine.score(PROMPTS, responses)
        assert scores == pytest.approx(expected.score(PROMPTS, responses), abs=1e-8)
        assert found(engine.generate(PROMPTS, SEARCH)) == found(expected.generate(PROMPTS, SEARCH))


def test_from_folders_an_adapter_is_for_the_untuned_model_or_the_one_it_names(
    tmp_path: Path,
) -> None:
    small = save_tiny(tmp_path / "small", seed=2, layers=1)
    base = save_tiny(tmp_path / "base", "gpt2", seed=1, layers=1)
    model = tiny_model(
        "llama", seed=2, layers=1, vocab_size=258, eos=(257,), bos=256, dtype=torch.float32
    )
    adapter = save_adapter(model, tmp_path / "adapter", target_modules=ALL)
    whole = merged(model, adapter)
    whole.save_pretrained(tmp_path / "whole")
    byte_tokenizer().save_pretrained(tmp_path / "whole")
    params = SearchParams(max_new_tokens=10, seed=1)

    def texts(*guides: Guide) -> list[str | None]:
        return [result.text for result in make(base, *guides).generate(["a film", "ab"], params)]

    expected = texts(Guide(tmp_path / "whole", small))
    assert texts(Guide(adapter, small)) == expected
    again = [Guide(adapter, small), Guide(f"{adapter}/../adapter", small.parent / "." / small.name)]
    engine = make(base, *again)  # the same by other spellings: held once, and run once
    assert engine.guides[0].models == engine.guides[1].models
    with pytest.raises(UnsupportedModel, match="does not say which model it is for"):
        make(base, Guide(adapter, None))
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(small)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert texts(Guide(adapter, None)) == texts(Guide(tmp_path / "whole", None))
    # As the base, too: the model that it names, held once.
    engine = Engine(base=adapter, guides=[Guide(adapter, small)], device="cpu", kv_cache_tokens=512)
    assert engine.base is engine.guides[0].models[0]
    assert engine.base.model is engine.guides[0].models[1].model


def test_an_adapters_own_tokenizer_has_to_fit(tmp_path: Path) -> None:
    small = save_tiny(tmp_path / "small", seed=2, layers=1)
    model = tiny_model(
        "llama", seed=2, layers=1, vocab_size=258, eos=(257,), bos=256, dtype=torch.float32
    )
    adapter = save_adapter(model, tmp_path / "adapter", target_modules=ALL)
    byte_tokenizer().save_pretrained(adapter)
    Engine(base=small, guides=[Guide(adapter, small)], device="cpu", kv_cache_tokens=512)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["added"])
    tokenizer.save_pretrained(adapter)
    with pytest.raises(MismatchedVocabulary):
        Engine(base=small, guides=[Guide(adapter, small)], device="cpu", kv_cache_tokens=512)


def test_weights_that_change_under_an_engine_are_followed(tmp_path: Path) -> None:
    base, small = models()
    small = copy.deepcopy(small)
    save_adapter(small, tmp_path, target_modules=ALL, use_dora=True)
    engine = as_on_cuda(base, Guide(str(tmp_path), small))
    before = found(engine.generate(PROMPTS, SEARCH))
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            if "v_proj" in name:
                parameter.mul_(-2)
    expected = make(base, Guide(with_adapter(small, tmp_path, merge=True), small))
    theirs = found(expected.generate(PROMPTS, SEARCH))
    assert found(engine.generate(PROMPTS, SEARCH)) == theirs != before


@pytest.mark.parametrize(
    ("method", "how", "before"),
    [("cbs", make, 2), ("cbs", as_on_cuda, 2), ("fusion", make, 3), ("fusion", as_on_cuda, 2)],
)
def test_both_sides_are_one_pass(method: str, how: Any, before: int, tmp_path: Path) -> None:
    """``before``: passes of each side by itself: of prompts, and, where nothing is recorded, of
    their last tokens, from which fusion draws."""
    base, small = models()
    save_adapter(small, tmp_path, target_modules=ALL)
    whole = merged(small, tmp_path)
    ours, theirs = how(base, Guide(tmp_path, small)), how(base, Guide(whole, small))
    with passes_of(small) as untuned, passes_of(whole) as tuned:
        ours.generate(PROMPTS, METHODS[method])  # the first time nothing is replayed yet
        assert untuned and not tuned
        together = list(untuned)
        untuned.clear()
        theirs.generate(PROMPTS, METHODS[method])
    joined = [own + other for own, other in zip(untuned, tuned, strict=True)]
    assert len(joined) > before
    assert together[2 * before :] == joined[before:]
    assert sum(together) == sum(joined)


@contextmanager
def passes_of(model: PreTrainedModel) -> Iterator[list[int]]:
    """The tokens of every pass through the model's weights."""
    tokens: list[int] = []

    def count(_module: object, args: tuple[torch.Tensor, ...], _output: object) -> None:
        tokens.append(args[0].numel())

    handle = model.get_input_embeddings().register_forward_hook(count)
    try:
        yield tokens
    finally:
        handle.remove()


def test_guides_of_other_vocabularies_may_be_adapters(tmp_path: Path) -> None:
    small = save_tiny(tmp_path / "small", seed=2, layers=1)
    adapter = save_adapter(saved_model(), tmp_path / "adapter", target_modules=ALL)
    merged(saved_model(), adapter).save_pretrained(tmp_path / "whole")
    byte_tokenizer().save_pretrained(tmp_path / "whole")
    tokenizer = trained("bytes-gpt2")
    base = tiny_model(vocab_size=len(tokenizer), eos=(tokenizer.eos_token_id,), bos=None)
    params = SearchParams(chunk_length=4, max_new_tokens=12, seed=3)

    def results(tuned: Path, **options: Any) -> list[SearchResult]:
        engine = make(base, Guide(tuned, small), tokenizer=tokenizer, dtype="auto", **options)
        return engine.generate(["the film was", "x"], params)

    ours, theirs = results(adapter), results(tmp_path / "whole")
    assert found(ours) == found(theirs)
    for own, other in zip(ours, theirs):
        assert own.score == pytest.approx(other.score, abs=1e-3)
