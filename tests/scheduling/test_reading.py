"""What models say of given tokens, against whole forward passes."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from transformers import PreTrainedModel

from tests.support.broken_models import broken_triple
from tests.support.engines import (
    LONG_PROMPTS,
    PROMPTS,
    SEARCH,
    assert_all_pages_free,
    engine,
    make_engine,
    tiny_engine,
)
from tests.support.tiny_models import byte_tokenizer, tiny_model, tiny_triple
from w2s_fast import Engine, Guide
from w2s_fast.errors import InvalidRequest, NumericalError


def whole_forward(model: PreTrainedModel, text: Sequence[int]) -> torch.Tensor:
    """log p of every token behind each place, float64 [T - 1, V]."""
    with torch.no_grad():
        logits = model(torch.tensor([list(text)])).logits[0, :-1]
    return logits.double().log_softmax(-1)


@pytest.mark.parametrize("bound", [None, 7])
def test_every_token_is_told_as_a_whole_forward_has_it(bound: int | None) -> None:
    e = tiny_engine(max_pass_tokens=bound)
    texts = [*PROMPTS, *LONG_PROMPTS]
    for text, told in zip(texts, e.log_probs(texts, top=3), strict=True):
        assert told.token_ids == text
        assert told.logprobs[0] is None and told.top[0] is None
        if len(text) == 1:
            continue
        expected = whole_forward(e.base.model, text)
        own = expected.gather(1, torch.tensor(text[1:])[:, None])[:, 0]
        assert told.logprobs[1:] == pytest.approx(own.tolist(), abs=1e-5)
        for place, top in zip(expected, told.top[1:], strict=True):
            assert top is not None
            assert list(top) == place.topk(3).indices.tolist()
            assert list(top.values()) == pytest.approx(place.topk(3).values.tolist(), abs=1e-5)
    assert_all_pages_free(e)


def test_the_likeliest_token_has_the_first_value_to_the_last_bit() -> None:
    e = engine(dtype=torch.float32)
    text = [3]
    for _ in range(40):  # greedy, so that each token is the likeliest
        top = e.log_probs([[*text, 0]], top=1)[0].top[-1]
        assert top is not None
        text += top
    (told,) = e.log_probs([text], top=1)
    for own, top in zip(told.logprobs[1:], told.top[1:], strict=True):
        assert top is not None and [own] == list(top.values())


def test_a_text_is_tokenised_as_a_prompt_is() -> None:
    model = tiny_model(vocab_size=258, eos=(257,), bos=256)
    e = Engine(base=model, tokenizer=byte_tokenizer(), device="cpu", kv_cache_tokens=512)
    (told,) = e.log_probs(["ab"])
    assert told.token_ids == byte_tokenizer()("ab")["input_ids"]
    assert told.top == [None, {}, {}]


def test_texts_that_cannot_be_read_are_refused_and_nothing_is_read() -> None:
    e = tiny_engine(kv_cache_tokens=64)
    for text, why in [([99], "outside"), ([1] * 90, "allowed"), ("text", "no tokenizer")]:
        with pytest.raises(InvalidRequest, match=why):
            e.log_probs([PROMPTS[0], text])
    assert_all_pages_free(e)


def test_nan_is_named_and_harms_nobody_else() -> None:
    e = make_engine(*broken_triple(tiny_triple(), "base", 17, float("nan")))
    with pytest.raises(NumericalError, match=r"'base'.*in a text of 5 tokens"):
        e.log_probs([[1, 2, 17, 4, 5]])
    assert e.log_probs([[1, 2, 3]])[0].logprobs[0] is None
    assert_all_pages_free(e)


def test_reading_makes_room_for_itself_beside_a_search() -> None:
    e = make_engine(*tiny_triple(eos=()), kv_cache_tokens=120)
    text = [t % 18 + 1 for t in range(118)]
    stream = e.stream(PROMPTS[2], SEARCH)
    next(stream)
    expected = whole_forward(e.base.model, text).gather(1, torch.tensor(text[1:])[:, None])
    assert e.log_probs([text])[0].logprobs[1:] == pytest.approx(expected[:, 0].tolist(), abs=1e-5)
    *_, last = stream
    alone = make_engine(*tiny_triple(eos=()), kv_cache_tokens=4096)
    assert last.result is not None
    assert last.result.token_ids == alone.generate(PROMPTS[2], SEARCH)[0].token_ids


def test_each_token_s_part_of_the_score() -> None:
    e = engine()
    responses = [[4, 5, 6], [7], [2, 2, 3, 4, 9, 11]]
    tuned, untuned = (model.model for model in e.guides[0].models)
    parts = e.token_scores(PROMPTS[:3], responses)
    for prompt, response, own in zip(PROMPTS, responses, parts):
        places = slice(len(prompt) - 1, None)
        ids = torch.tensor(response)[:, None]
        of = [
            whole_forward(m, [*prompt, *response])[places].gather(1, ids) for m in (tuned, untuned)
        ]
        assert own == pytest.approx((of[0] - of[1])[:, 0].tolist(), abs=1e-5)
        (base,) = e.token_scores([prompt], [response], model="base")
        told = e.log_probs([[*prompt, *response]])[0].logprobs
        assert base == pytest.approx(told[len(prompt) :], abs=1e-5)
        both = [e.token_scores([prompt], [response], model=m)[0] for m in ("tuned", "untuned")]
        assert own == pytest.approx([a - b for a, b in zip(*both)], abs=1e-6)
    assert e.score(PROMPTS[:3], responses) == pytest.approx(list(map(sum, parts)), abs=1e-9)
    with pytest.raises(InvalidRequest, match="allowed: base, tuned, untuned"):
        e.token_scores([PROMPTS[0]], [[1]], model="gpt-5")


def test_models_of_several_guides_have_numbers() -> None:
    base, tuned, untuned = tiny_triple()
    more = Guide(tuned=copy.deepcopy(tuned), untuned=untuned, weight=-2.0)
    e = make_engine(base, tuned, untuned, [more])
    (own,) = e.token_scores([PROMPTS[0]], [[4, 5]])
    of = {
        m: e.token_scores([PROMPTS[0]], [[4, 5]], model=m)[0]
        for m in ("tuned 0", "untuned 0", "tuned 1", "untuned 1")
    }
    expected = [
        a - b - 2 * (c - d)
        for a, b, c, d in zip(of["tuned 0"], of["untuned 0"], of["tuned 1"], of["untuned 1"])
    ]
    assert own == pytest.approx(expected, abs=1e-6)
