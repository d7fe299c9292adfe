"""Texts end at the stop string that is complete first, however many tokens come at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.drawn import drawn
from tests.support.stop_reference import text_end
from tests.support.tiny_models import byte_tokenizer
from tests.support.tokenizers import byte_level, metaspace, unigram
from w2s_fast.text import StopStrings, TextEnd, decode_response, open_bytes

SPECIAL = "<|end|>"
MAKERS: dict[str, Callable[[], Any]] = {
    "bytes": byte_tokenizer,
    "byte level": lambda: byte_level(SPECIAL),
    "metaspace": lambda: metaspace(SPECIAL),
    "unigram": lambda: unigram(SPECIAL),
}
TEXTS = [
    "the user ok end the end",
    "aab aaab ab",
    "caf\u00e9 \u4f60\u597d \U0001f469\u200d\U0001f467 ok",
    "line\nline\n\n. end",
    "  two  spaces",
]
STOPS = ["ab", "aab", "end", " end", "the e", "\n\n", "\u597d ok", "\u00e9", "\u200d", "k", "  "]


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def found_in_pieces(stops: StopStrings, tokens: list[int], cuts: list[int]) -> TextEnd | None:
    known = 0
    for end in [*sorted(cuts), len(tokens)]:
        if end > known:
            if (found := stops.find(tokens[:end], known)) is not None:
                return found
            known = end
    return None


@pytest.mark.parametrize("kind", MAKERS)
@drawn(40)
@given(data=st.data())
def test_an_end_is_found_as_it_is_defined(kind: str, data: Any) -> None:
    tokenizer = MAKERS[kind]()
    prompt = ids_of(tokenizer, data.draw(st.sampled_from(["", "the", "a ", "\u4f60"]))) or [5]
    tokens: list[int] = []
    for text in data.draw(st.lists(st.sampled_from(TEXTS), min_size=1, max_size=3)):
        tokens += ids_of(tokenizer, text)
        if kind != "bytes" and data.draw(st.booleans()):
            tokens.append(tokenizer.convert_tokens_to_ids(SPECIAL))
    chosen = data.draw(st.lists(st.sampled_from([*STOPS, SPECIAL]), min_size=1, max_size=3))
    least = data.draw(st.sampled_from([0, 0, 3, 9]))
    stops = StopStrings(tokenizer, prompt, chosen, least)
    expected = text_end(tokenizer, prompt, tokens, chosen, least)
    cuts = data.draw(st.lists(st.integers(0, len(tokens)), max_size=6))
    found = found_in_pieces(stops, tokens, cuts)
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        kept, text, stop = expected
        assert (found.tokens, found.stop) == (kept, stop)
        assert decode_response(tokenizer, prompt, tokens[:kept]) + found.rest == text


@pytest.mark.parametrize("kind", MAKERS)
@drawn(25)
@given(data=st.data())
def test_what_is_settled_is_in_the_text_whatever_comes(kind: str, data: Any) -> None:
    tokenizer = MAKERS[kind]()
    tokens = ids_of(tokenizer, data.draw(st.sampled_from(TEXTS)))
    tokens += ids_of(tokenizer, data.draw(st.sampled_from(TEXTS)))
    chosen = data.draw(st.lists(st.sampled_from(STOPS), min_size=1, max_size=3))
    stops = StopStrings(tokenizer, [5], chosen)
    end = stops.find(tokens, 0)
    whole = len(tokens) if end is None else end.tokens
    settled = 0
    for so_far in range(1, len(tokens) + 1):
        if stops.find(tokens[:so_far], 0) is not None:
            break
        now = stops.settled(tokens[:so_far], settled)
        assert settled <= now <= whole
        settled = now
        shown = decode_response(tokenizer, [5], tokens[:so_far])
        open_end = shown.endswith("\ufffd") or open_bytes(tokenizer, tokens[:so_far])
        # Nothing is held back where no stop string can begin.
        if not open_end and not any(stop[:1] in shown[-30:] for stop in chosen):
            assert settled == so_far


def test_what_ends_with_the_prompt_never_counts() -> None:
    tokenizer = byte_tokenizer()
    prompt, tokens = ids_of(tokenizer, "a\n"), ids_of(tokenizer, "\nb")
    assert StopStrings(tokenizer, prompt, ["\n\n"]).find(tokens, 0) is None


def test_of_two_that_are_complete_together_the_longer_one_ends_the_text() -> None:
    tokenizer = byte_tokenizer()
    tokens = ids_of(tokenizer, "xabc")
    assert StopStrings(tokenizer, [5], ["c", "bc", "abcd"]).find(tokens, 0) == TextEnd(2, "", "bc")
    assert StopStrings(tokenizer, [5], ["abcd", "b"]).find(tokens, 0) == TextEnd(2, "", "b")


def test_it_may_begin_and_end_within_tokens() -> None:
    tokenizer = byte_level()
    tokens = ids_of(tokenizer, "the user end")
    assert tokenizer.convert_ids_to_tokens(tokens) == ["the", "\u0120user", "\u0120end"]
    end = StopStrings(tokenizer, [5], ["er en"]).find(tokens, 0)
    assert end == TextEnd(1, " us", "er en")


def test_a_character_that_is_cut_belongs_to_the_stop_string() -> None:
    tokenizer = byte_tokenizer()
    tokens = ids_of(tokenizer, "a\u597db")
    stops = StopStrings(tokenizer, [5], ["\u597d"])
    assert stops.find(tokens[:3], 0) is None and stops.settled(tokens[:3], 0) == 1
    assert stops.find(tokens[:4], 3) == TextEnd(1, "", "\u597d")
