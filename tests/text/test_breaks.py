"""A text is broken behind the token in which a string is complete, however many came at a time."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.drawn import drawn
from tests.support.stop_reference import completes
from tests.support.tiny_models import byte_tokenizer
from tests.support.tokenizers import byte_level, metaspace
from tests.text.test_stops import MAKERS, SPECIAL, ids_of
from w2s_fast.text import Breaks

TEXTS = [
    "the user ok end the end",
    "aab aaab ab",
    "caf\u00e9 \u4f60\u597d \U0001f469\u200d\U0001f467 ok",
    "line\nline\n\n\n. end",
    "  two   spaces",
]
STRINGS = ["ab", "aab", "end", "the e", "\n", "\n\n", ". ", "\u597d ok", "\u00e9", "\u200d", "  "]


def parts_of(breaks: Breaks, tokens: list[int], cuts: list[int]) -> list[int]:
    """Where parts end, of tokens that come up to one cut after the other."""
    parts, known = [], 0
    for end in [*sorted(cuts), len(tokens)]:
        while (found := breaks.find(tokens[:end], known)) is not None:
            parts.append(found)
            known = found
    return parts


@pytest.mark.parametrize("kind", MAKERS)
@drawn(40)
@given(data=st.data())
def test_parts_end_as_they_are_defined(kind: str, data: Any) -> None:
    tokenizer = MAKERS[kind]()
    prompt = ids_of(tokenizer, data.draw(st.sampled_from(["", "the", "a\n", "\u4f60"]))) or [5]
    tokens: list[int] = []
    for text in data.draw(st.lists(st.sampled_from(TEXTS), min_size=1, max_size=2)):
        own = ids_of(tokenizer, text)
        tokens += own[data.draw(st.integers(0, len(own) - 1)) :]  # perhaps from within a character
        if kind != "bytes" and data.draw(st.booleans()):
            tokens.append(tokenizer.convert_tokens_to_ids(SPECIAL))
    chosen = data.draw(st.lists(st.sampled_from([*STRINGS, SPECIAL]), min_size=1, max_size=3))
    cuts = data.draw(st.lists(st.integers(1, len(tokens)), max_size=4))
    expected = [
        end
        for end in range(1, len(tokens) + 1)
        if completes(tokenizer, prompt, tokens[:end], chosen)
    ]
    assert parts_of(Breaks(tokenizer, prompt, chosen), tokens, cuts) == expected


def test_what_ends_with_the_prompt_never_counts() -> None:
    tokenizer = byte_tokenizer()
    breaks = Breaks(tokenizer, ids_of(tokenizer, "a\n"), ["\n\n"])
    assert breaks.find(ids_of(tokenizer, "\nb"), 0) is None
    assert breaks.find(ids_of(tokenizer, "\nb\n\n"), 0) == 4


def test_it_may_begin_in_one_part_and_end_the_next() -> None:
    tokenizer = byte_tokenizer()
    breaks = Breaks(tokenizer, [5], ["abc", "ab"])
    tokens = ids_of(tokenizer, "xabcab")
    assert [breaks.find(tokens, known) for known in range(6)] == [3, 3, 3, 4, 6, 6]
    assert breaks.find(tokens, 6) is None


def test_it_ends_with_the_whole_of_a_token() -> None:
    tokenizer = byte_level()
    tokens = ids_of(tokenizer, "the user end")
    assert tokenizer.convert_ids_to_tokens(tokens) == ["the", "\u0120user", "\u0120end"]
    assert Breaks(tokenizer, [5], ["us", "zz"]).find(tokens, 0) == 2
    assert Breaks(tokenizer, [5], ["e us"]).find(tokens, 1) == 2


def test_bytes_that_spoil_a_character_before_them_do_not_take_it_back() -> None:
    tokenizer = metaspace()
    tokens = [*ids_of(tokenizer, "ok\n"), *tokenizer.convert_tokens_to_ids(["<0xE5>", "<0x0A>"])]
    at = len(tokens) - 2
    breaks = Breaks(tokenizer, [5], ["\n"])
    assert breaks.find(tokens[:at], 0) == breaks.find(tokens, 0) == at
