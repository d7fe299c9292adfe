"""Tokens to text: what a response adds to its prompt, wherever the prompt's last tokens begin."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.drawn import drawn
from tests.support.tokenizers import byte_level, metaspace, unigram
from w2s_fast.text import decode_response

TOKENIZERS = {"byte level": byte_level("<eot>"), "fallback to bytes": metaspace("<eot>")}
PIECES = st.sampled_from(
    ["the", " the", "ok ", "\u4e2d", "\u6587\u5b57", "\U0001f600", "\u00e9", "a"]
)


def whole(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("name", TOKENIZERS)
@drawn(30)
@given(prompt=st.lists(PIECES, min_size=1, max_size=8), answer=st.lists(PIECES, max_size=4))
def test_prompt_and_response_make_the_whole_text(
    name: str, prompt: list[str], answer: list[str]
) -> None:
    tokenizer = TOKENIZERS[name]
    text, more = "x" + "".join(prompt), "".join(answer)
    ids = whole(tokenizer, text + "|" + more)
    first = whole(tokenizer, text + "|")
    assert ids[: len(first)] == first  # nothing is merged with it
    assert decode_response(tokenizer, first, ids[len(first) :]) == more


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("prompt", ["\u4e2d" * 6, "\U0001f600" * 5, "a" + "\u4e2d" * 3, "\u4e2d"])
def test_a_space_stays_whatever_characters_the_prompt_is_cut_in(name: str, prompt: str) -> None:
    tokenizer = TOKENIZERS[name]
    whole_prompt, (*_, the) = whole(tokenizer, prompt), whole(tokenizer, "a the")
    for begin in range(3):
        for end in range(len(whole_prompt) - 3, len(whole_prompt) + 1):
            ids = whole_prompt[begin:end]
            if tokenizer.decode(ids):
                assert decode_response(tokenizer, ids, [the]) == " the", (begin, end)


def test_special_tokens_before_a_response_do_not_hide_that_text_goes_on() -> None:
    tokenizer = metaspace("<eot>")
    ok, the, eot = (tokenizer.convert_tokens_to_ids(t) for t in ("ok", "\u2581the", "<eot>"))
    assert decode_response(tokenizer, [ok] + [eot] * 12, [the, eot]) == " the"
    assert decode_response(tokenizer, [1], [the]) == "the"  # it begins the text
    assert decode_response(unigram(), [1], [unigram().convert_tokens_to_ids("\u2581the")]) == " the"


def test_a_character_that_prompt_and_response_share_is_no_characters_text() -> None:
    for tokenizer in TOKENIZERS.values():
        ids = whole(tokenizer, "a\u4e2d the")
        assert decode_response(tokenizer, ids[:-2], ids[-2:]) == "\ufffd the"


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("prompt", ["a\u4e2d\u4e2d", "\u4e2d\u4e2d\u4e2d\u4e2d", "\u4e2d"])
def test_a_response_begins_with_whole_characters_behind_one_that_is_cut(
    name: str, prompt: str
) -> None:
    tokenizer = TOKENIZERS[name]
    answer = whole(tokenizer, "a\u00e9 the")[len(whole(tokenizer, "a")) :]
    assert decode_response(tokenizer, whole(tokenizer, prompt)[:-1], answer) == "\u00e9 the"
