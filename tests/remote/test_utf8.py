"""Texts held as bytes end, and are broken, where strings say so."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.support.drawn import drawn
from w2s_fast.remote import EOS, Utf8Breaks, Utf8Stops, Utf8Texts, to_bytes, to_text

TEXTS = st.text(alphabet="ab\u00e9\u00e8\u4e2d\u4e2e\U0001f600\n", max_size=14)
STRINGS = st.lists(
    st.text(alphabet="ab\u00e9\u00e8\u4e2d\u4e2e\U0001f600\n", min_size=1, max_size=4),
    min_size=1, max_size=4,
)  # fmt: skip


def naive(text: str, strings: list[str], known: int) -> tuple[int, str] | None:
    """The end of the first string that is complete behind what is known, the longest of several."""
    for end in range(known + 1, len(text) + 1):
        there = [string for string in strings if text[:end].endswith(string)]
        if there:
            return end, max(there, key=len)
    return None


@drawn(200)
@given(text=TEXTS, stops=STRINGS, known=st.integers(0, 14))
def test_a_text_ends_at_the_stop_string_that_is_complete_first(
    text: str, stops: list[str], known: int
) -> None:
    known = min(known, len(text))
    assume(naive(text[:known], stops, 0) is None)
    found = Utf8Stops(stops).find(to_bytes(text), len(to_bytes(text[:known])))
    expected = naive(text, stops, known)
    if expected is None:
        assert found is None
        return
    end, stop = expected
    assert found is not None and (found.stop, found.rest) == (stop, "")
    assert to_text(to_bytes(text)[: found.tokens]) == text[: end - len(stop)]


@drawn(200)
@given(text=TEXTS, more=TEXTS, stops=STRINGS, cut=st.integers(0, 3))
def test_what_is_settled_stays_whatever_comes(
    text: str, more: str, stops: list[str], cut: int
) -> None:
    """Also where a text is cut inside a character."""
    tokens = to_bytes(text)[: len(to_bytes(text)) - cut]
    known = Utf8Stops(stops)
    assume(known.find(tokens, 0) is None)
    settled = known.settled(tokens, 0)
    end = known.find([*tokens, *to_bytes(more)], len(tokens))
    assert end is None or end.tokens >= settled
    whole = to_text(tokens)
    held = max(n for stop in stops for n in range(len(stop)) if whole.endswith(stop[:n]))
    if cut == 0:
        assert settled == len(to_bytes(text[: len(text) - held]))


@drawn(200)
@given(text=TEXTS, strings=STRINGS, known=st.integers(0, 14))
def test_a_chunk_ends_behind_the_string_that_is_complete_first(
    text: str, strings: list[str], known: int
) -> None:
    known = min(known, len(text))
    found = Utf8Breaks(strings).find(to_bytes(text), len(to_bytes(text[:known])))
    expected = naive(text, strings, known)
    assert found == (None if expected is None else len(to_bytes(text[: expected[0]])))


@drawn(200)
@given(text=st.text(max_size=12), cut=st.integers(0, 12))
def test_bytes_are_the_text_and_nothing_but(text: str, cut: int) -> None:
    ids = to_bytes(text)
    assert to_text(ids) == to_text([*ids, EOS]) == text
    assert text.startswith(to_text(ids[:cut])) and to_text(ids[:cut]) in text
    assert [said.text for said in Utf8Texts().extend([(None, ids, None, True)])] == [text]


def test_half_a_pair_is_no_text_and_ends_none() -> None:
    assert to_text(to_bytes("a\ud800b")) == "a?b"
    assert Utf8Stops(["\ud800"]).find(to_bytes("a?b"), 0) is None
    assert Utf8Breaks(["\ud800"]).find(to_bytes("a?b"), 0) is None


@pytest.mark.parametrize("known", [0, 2])
def test_an_eos_behind_a_text_says_nothing(known: int) -> None:
    assert Utf8Stops(["bc"]).find([*to_bytes("abc"), EOS], known) is not None
    assert Utf8Breaks(["c"]).find([*to_bytes("abc"), EOS], known) == 3
