"""Real models: what they say is what transformers says, and scores are those of whole texts.

Run by ``make real-test``, which fetches them, and where they have been fetched.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tests.support.real_models import fetched
from w2s_fast import Engine, Guide, SearchParams, SearchResult
from w2s_fast.demo import adapter_path
from w2s_fast.real import GEMMA3, SMOLLM2

pytestmark = pytest.mark.real

LONG = "The quick brown fox jumps over the lazy dog, and then it sleeps. " * 40
TEXTS = {
    "english": "The history of the city begins in",
    "code": "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "chinese": "今天天气很好,我们一起去",
    "emoji": "I love it 🎬🍿 because 👩‍👩‍👧 and",
    "600 tokens": LONG,
}
CHAT = [
    {"role": "system", "content": "You answer in one sentence."},
    {"role": "user", "content": "What is the capital of France?"},
]
NEW = 24  # tokens
GREEDY = SearchParams(method="sample", temperature=0.0, max_new_tokens=NEW)
SEARCH = SearchParams(
    beam_width=2, successors=2, chunk_length=5, max_new_tokens=15, seed=7, trace=True
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    yield
    for own in (loaded, tokenizer_of, engine_of):
        own.cache_clear()  # gigabytes


@cache
def loaded(name: str) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        fetched(name), dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


@cache
def tokenizer_of(name: str) -> Any:
    return AutoTokenizer.from_pretrained(fetched(name))


@cache
def engine_of(base: str, guided: bool = False) -> Engine:
    guides = [Guide(adapter_path(), loaded(SMOLLM2), tokenizer=tokenizer_of(SMOLLM2))] * guided
    return Engine(
        loaded(base),
        guides,
        tokenizer=tokenizer_of(base),
        device="cpu",
        kv_cache_tokens=8192,
    )


@pytest.mark.parametrize("name", [SMOLLM2, GEMMA3])
def test_greedy_answers_are_those_of_transformers(name: str) -> None:
    model, tokenizer = loaded(name), tokenizer_of(name)
    prompts: list[Any] = list(TEXTS.values())
    inputs = [tokenizer(text).input_ids for text in prompts]
    assert max(map(len, inputs)) >= 600
    if tokenizer.chat_template is not None:
        prompts.append(CHAT)
        chat = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)
        inputs.append(chat["input_ids"])
    assert (name == SMOLLM2) == (len(prompts) > len(TEXTS))
    ours = engine_of(name).generate(prompts, GREEDY)
    for prompt, ids, result in zip(prompts, inputs, ours):
        with torch.no_grad():
            whole = model.generate(
                torch.tensor([ids]), do_sample=False, max_new_tokens=NEW, pad_token_id=0
            )
        assert result.token_ids == whole[0, len(ids) :].tolist(), prompt


@pytest.mark.parametrize("base", [SMOLLM2, GEMMA3])
def test_scores_are_those_of_whole_texts(base: str) -> None:
    pytest.importorskip("peft")
    tuned, untuned = merged(), loaded(SMOLLM2)
    tokenizer = tokenizer_of(SMOLLM2)
    prompts = [TEXTS["english"], "This film was", TEXTS["chinese"]]
    engine = engine_of(base, guided=True)
    results = engine.generate(prompts, SEARCH)
    for prompt, result in zip(prompts, results):
        if base == SMOLLM2:
            before = tokenizer(prompt).input_ids
            whole = before + result.token_ids
        else:
            before, whole = tokenizer(prompt).input_ids, tokenizer(prompt + said(result)).input_ids
            if result.hypotheses[0].finish_reason == "eos":
                whole = [*whole, tokenizer.eos_token_id]
        start = common(before, whole)
        expected = logprob(tuned, whole, start) - logprob(untuned, whole, start)
        assert result.score == pytest.approx(expected, abs=2e-3), prompt
    # Both sides are one model in memory.
    assert {id(model.model) for model in engine.guides[0].models} == {id(untuned)}


@pytest.mark.parametrize("base", [SMOLLM2, GEMMA3])
def test_streams_are_the_texts(base: str) -> None:
    engine = engine_of(base)
    for prompt in (TEXTS["english"], TEXTS["emoji"], TEXTS["chinese"]):
        params = SearchParams(method="sample", max_new_tokens=20, seed=3)
        *pieces, last = engine.stream(prompt, params)
        assert last.result is not None
        assert "".join(piece.text or "" for piece in (*pieces, last)) == last.result.text
        assert last.result.text == engine.generate([prompt], params)[0].text


@cache
def merged() -> PreTrainedModel:
    from peft import PeftModel

    own: Any = PeftModel.from_pretrained(copy.deepcopy(loaded(SMOLLM2)), adapter_path())
    found: PreTrainedModel = own.merge_and_unload().eval()
    return found


def said(result: SearchResult) -> str:
    assert result.text is not None
    return result.text


def common(a: list[int], b: list[int]) -> int:
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return i
    return min(len(a), len(b))


def logprob(model: PreTrainedModel, whole: list[int], start: int) -> float:
    """Of the tokens from ``start`` on, in nats."""
    with torch.no_grad():
        logits = model(torch.tensor([whole]), use_cache=False).logits[0, start - 1 : -1]
    targets = torch.tensor(whole[start:])[:, None]
    return float(logits.double().log_softmax(-1).gather(1, targets).sum())
