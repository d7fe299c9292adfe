"""Where a text spells special tokens: the leftmost, and the longest there."""

from __future__ import annotations

import re
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.support.tokenizers import byte_level
from w2s_fast.text import PromptEncoder
from w2s_fast.text.special_tokens import SpecialTokens, between, longest_of


@given(
    texts=st.sets(st.text("ab|.", min_size=1, max_size=4), max_size=8),
    where=st.text("ab|.", max_size=12),
)
def test_the_longest_of_texts_is_found(texts: set[str], where: str) -> None:
    match = re.match(longest_of(texts), where)
    fitting = [text for text in texts if where.startswith(text)]
    assert (match[0] if match else None) == max(fitting, key=len, default=None)


def test_what_does_not_count_hides_nothing_behind_it() -> None:
    specials = SpecialTokens(byte_level("<a><b", "<b>"))
    assert specials.find("<a><b>") == [(0, 5)]
    assert specials.find("<a><b>", lambda span: span[0] > 0) == [(3, 6)]
    assert between("x<b>y", [(1, 4)]) == ["x", "y"]


def test_a_tokenizer_may_have_thousands_of_special_tokens() -> None:
    names = [f"<reserved {i}>" for i in range(6500)]
    tokenizer: Any = byte_level(*names)
    one = PromptEncoder("base", tokenizer, "{prompt}" + names[-1], vocab_size=9999, bos_token_id=1)
    *text, last = one.encode(names[0])
    assert last == tokenizer.convert_tokens_to_ids(names[-1])
    assert tokenizer.decode(text) == names[0] and len(text) > 5
