"""Growing texts in the vocabularies of real models, and from one of them to the other.

Run by ``make real-test``, which fetches them, and where they have been fetched.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.support.real_models import fetched
from tests.support.trained_tokenizers import drawn_text
from tests.text.test_translation import cut, grow
from w2s_fast.real import GEMMA3, SMOLLM2
from w2s_fast.text import GrowingTexts, PromptEncoder, Said
from w2s_fast.text.translation import Grown

pytestmark = pytest.mark.real


@cache
def tokenizer_of(model: str) -> Any:
    return AutoTokenizer.from_pretrained(fetched(model))


@pytest.mark.parametrize("model", [SMOLLM2, GEMMA3])
def test_growing_texts_have_the_tokens_of_the_whole(model: str) -> None:
    tokenizer = tokenizer_of(model)
    own = PromptEncoder(
        model, tokenizer, vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id
    )
    translator = own.translator()
    assert translator._cuts is not None
    drawing = random.Random(2)
    for _ in range(20):
        prompt, response = drawn_text(drawing, 4), drawn_text(drawing, 15)
        lengths = [drawing.choice((1, 2, 3, 5, 8, 20)) for _ in range(30)]
        grow(translator, own, prompt, cut(response, lengths))


@pytest.mark.parametrize(("base", "guide"), [(SMOLLM2, GEMMA3), (GEMMA3, SMOLLM2)])
def test_what_one_model_says_has_the_other_ones_tokens(base: str, guide: str) -> None:
    speaks, reads = tokenizer_of(base), tokenizer_of(guide)
    own = PromptEncoder(guide, reads, vocab_size=len(reads), bos_token_id=reads.bos_token_id)
    translator, listener = own.translator(), GrowingTexts(speaks)
    drawing = random.Random(3)
    for _ in range(10):
        prompt, response = drawn_text(drawing, 4), drawn_text(drawing, 15)
        before = speaks(prompt).input_ids
        tokens = speaks(prompt + response).input_ids[len(before) :]
        text, said = translator.begin(own.as_text(prompt)), Said()
        for end in range(5, len(tokens) + 5, 5):
            (heard,) = listener.extend([(before, tokens[:end], said, False)])
            assert isinstance(heard, Said)
            said = heard
            (grown,) = translator.extend([text], [said.text])
            assert isinstance(grown, Grown)
            text = grown.text
            whole = own._need_texts().encode(own.as_text(prompt).followed_by(said.text))
            assert text.ids.tolist() == whole
