"""The search on the device: in float32 against the naive reference, in half precision against
itself and against a recomputation of its scores by transformers."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.support.adapters import LINEAR, save_adapter, with_adapter
from tests.support.tiny_models import tiny_model
from tests.support.trained_tokenizers import trained
from w2s_fast import Engine, Guide, SearchParams, SearchResult

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [2, 2], [3, 9], [1, 4, 4], [8]]
PARAMS = [
    SearchParams(beam_width=2, successors=3, chunk_length=3, max_new_tokens=12, trace=True),
    SearchParams(beam_width=3, successors=2, chunk_length=2, max_new_tokens=12, top_k=0, top_p=0.9),
    SearchParams(method="bon", successors=4, n=2, max_new_tokens=10, top_k=0),
    SearchParams(method="sample", n=3, max_new_tokens=9, min_p=0.05),
    SearchParams(method="fusion", n=3, max_new_tokens=9, plausibility=0.05),
    SearchParams(
        proposal="dynamic_fusion", beam_width=2, successors=2, chunk_length=3, max_new_tokens=9
    ),
    SearchParams(method="beam", beam_width=3, n=2, max_new_tokens=10),
]
# How far a score of 12 tokens may be from one computed in another order, in nats.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.2, torch.bfloat16: 1.5}


def models(dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedModel]:
    base, tuned, untuned = (
        copy.deepcopy(tiny_model(family, seed=seed, layers=layers))
        for family, seed, layers in (("llama", 0, 2), ("gpt2", 1, 1), ("gpt2", 2, 1))
    )
    for model in (base, tuned, untuned):
        torch.nn.Module.to(model, device="cuda", dtype=dtype)
    return base, tuned, untuned


def results(engine: Engine) -> list[SearchResult]:
    return engine.generate(PROMPTS, PARAMS)


def eager_logprobs(model: PreTrainedModel, prompt: list[int], response: list[int]) -> Tensor:
    ids = torch.tensor([prompt + response], device="cuda")
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]


TEXTS = ["the film was a", "hello world", "\u4eca\u5929 it's", "x"]
READ = SearchParams(beam_width=3, successors=2, chunk_length=6, max_new_tokens=14, trace=True)


def reading_engine(device: str, *, foreign: bool) -> Engine:
    """Of text: with stop strings, or under a guide of another vocabulary."""

    def model(seed: int, vocab_size: int) -> PreTrainedModel:
        found = copy.deepcopy(tiny_model(seed=seed, vocab_size=vocab_size, bos=None))
        torch.nn.Module.to(found, device=device, dtype=torch.float32)
        return found

    base = trained("bytes-gpt2")
    guide = trained("bpe-first" if foreign else "bytes-gpt2")
    return Engine(
        model(0, len(base)),
        Guide(model(1, len(guide)), model(2, len(guide)), tokenizer=guide),
        tokenizer=base,
        device=device,
        kv_cache_tokens=4096,
    )


@pytest.mark.parametrize("foreign", [False, True], ids=["one vocabulary", "two"])
@pytest.mark.parametrize("changes", [{}, {"stop": (" ", "e")}, {"chunk_stop": (" ", "e")}], ids=str)
def test_what_texts_say_counts_on_the_device_as_on_the_cpu(
    foreign: bool, changes: dict[str, tuple[str, ...]]
) -> None:
    params = replace(READ, **changes)  # type: ignore[arg-type]
    found = reading_engine("cuda", foreign=foreign).generate(TEXTS, params)
    expected = reading_engine("cpu", foreign=foreign).generate(TEXTS, params)
    for ours, theirs in zip(found, expected, strict=True):
        assert [h.token_ids for h in ours.hypotheses] == [h.token_ids for h in theirs.hypotheses]
        assert ours.score == pytest.approx(theirs.score, abs=TOLERANCE[torch.float32])


def test_in_float32_the_device_finds_what_the_cpu_finds() -> None:
    on_gpu = models(torch.float32)
    on_cpu = [copy.deepcopy(model).to("cpu") for model in on_gpu]
    found = results(Engine(on_gpu[0], Guide(*on_gpu[1:]), device="cuda", kv_cache_tokens=4096))
    expected = results(Engine(on_cpu[0], Guide(*on_cpu[1:]), device="cpu", kv_cache_tokens=4096))
    for ours, theirs in zip(found, expected):
        assert [h.token_ids for h in ours.hypotheses] == [h.token_ids for h in theirs.hypotheses]
        if theirs.score is not None:
            assert ours.score == pytest.approx(theirs.score, abs=1e-3)


@pytest.mark.parametrize("graphs", [True, False])
def test_an_adapter_beside_its_model_finds_what_merged_weights_find(
    graphs: bool, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    base, _, untuned = models(torch.float32)
    save_adapter(untuned, tmp_path, target_modules=LINEAR["gpt2"], size=0.2)
    merged = with_adapter(untuned, tmp_path, merge=True)
    options = {"kv_cache_tokens": 8192, "cuda_graphs": graphs}
    ours = Engine(base, Guide(tmp_path, untuned), **options)
    theirs = Engine(base, Guide(merged, untuned), **options)
    for _ in range(3):  # the first time nothing is recorded
        for own, other in zip(results(ours), results(theirs)):
            assert own.token_ids == other.token_ids
            assert own.score == pytest.approx(other.score, abs=1e-3)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_scores_are_those_of_a_recomputation(dtype: torch.dtype) -> None:
    base, tuned, untuned = models(dtype)
    engine = Engine(base, Guide(tuned, untuned), device="cuda", kv_cache_tokens=4096)
    for prompt, result in zip(PROMPTS, results(engine)):
        for h in result.hypotheses:
            if not h.token_scores:  # no guide has scored it
                continue
            above, below = (eager_logprobs(m, prompt, h.token_ids) for m in (tuned, untuned))
            assert h.score == pytest.approx(float((above - below).sum()), abs=TOLERANCE[dtype])
            assert h.score == pytest.approx(sum(h.token_scores), abs=1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_same_request_gives_the_same_tokens_twice_and_leaves_no_page(
    dtype: torch.dtype,
) -> None:
    base, tuned, untuned = models(dtype)
    engine = Engine(base, Guide(tuned, untuned), device="cuda", kv_cache_tokens=4096)
    first, second = results(engine), results(engine)
    assert [r.token_ids for r in first] == [r.token_ids for r in second]
    for model in (engine.base, *engine.guides[0].models):
        assert model.pool.free_pages == model.pool.num_pages
