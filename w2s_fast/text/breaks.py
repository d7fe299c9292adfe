"""Where a text is broken into parts: behind strings that stay in it, as the ends of its steps.

A part ends with the token in which a string's last character stands. The text is looked at as it is
after every token, so what is found does not depend on how many tokens came at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from w2s_fast.text.response import INCOMPLETE, open_bytes
from w2s_fast.text.window import Window, special_ids


class Breaks:
    """The strings of one request behind which its hypotheses' texts are broken."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], strings: Sequence[str]
    ) -> None:
        """``prompt``: the base's tokens."""
        self._tokenizer = tokenizer
        self._prompt = list(prompt)
        self._strings = tuple(dict.fromkeys(strings))
        self._longest = max(map(len, self._strings))

    @cached_property
    def _ids(self) -> dict[int, str]:
        return special_ids(self._tokenizer, self._strings)

    def find(self, tokens: Sequence[int], known: int) -> int | None:
        """How many tokens the text has up to the end of its next part; None: it goes on.

        Args:
            tokens: of the response so far, without one that ends it by itself.
            known: how many of the first ones the parts before have. A string that began there, and
                is complete only now, ends this part.
        """
        window = Window(self._tokenizer, self._prompt, tokens, known, self._longest)
        new = range(known + 1, len(tokens) + 1)
        before = len(_whole(window.text_of(known)))
        if INCOMPLETE not in window.text and not self._complete(window.text, before):
            return next((end for end in new if tokens[end - 1] in self._ids), None)
        # Of a run of bytes less may be shown than before, when more of them are there.
        run = known - open_bytes(self._tokenizer, tokens[:known])
        for end in range(max(run, window.first), known):
            before = max(before, len(_whole(window.text_of(end))))
        for end in new:
            text = _whole(window.text_of(end))
            if tokens[end - 1] in self._ids or self._complete(text, before):
                return end
            before = max(before, len(text))
        return None

    def _complete(self, text: str, before: int) -> bool:
        """Whether a string is complete only behind so many characters."""
        return any(
            text.find(string, max(0, before - len(string) + 1)) >= 0 for string in self._strings
        )


def _whole(text: str) -> str:
    """Without a character at the end of which bytes are missing."""
    return text.rstrip(INCOMPLETE)
