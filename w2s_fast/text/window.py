"""The end of a response's text, as far back as a string may reach that is completed there."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from w2s_fast.text.response import CONTEXT_TOKENS, INCOMPLETE, decode_response


class Window:
    """The end of a response's text: of its tokens from ``first`` on.

    Attributes:
        text: theirs. It holds all that is new, and what a stop string may reach back to.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: list[int],
        tokens: Sequence[int],
        known: int,
        longest: int,
    ) -> None:
        self._tokenizer, self._prompt, self._tokens = tokenizer, prompt, tokens
        known = min(known, len(tokens))
        for self.first in _further_back(known, longest):
            if self.first == 0 or len(self.text_of(known).rstrip(INCOMPLETE)) >= longest:
                break
        self.text = self.text_of(len(tokens))

    def text_of(self, end: int) -> str:
        """Of the tokens up to this one, from the first of the window on."""
        before = [*self._prompt, *self._tokens[: self.first]][-CONTEXT_TOKENS[-1] :]
        return decode_response(self._tokenizer, before, self._tokens[self.first : end])

    def tokens_before(self, start: int) -> int:
        """How many of all tokens come before the one that a character of the text begins in."""
        for end in range(len(self._tokens), self.first, -1):
            shown = self.text_of(end)
            if len(shown) <= start and self.text.startswith(shown):
                return end
        return self.first


def _further_back(known: int, longest: int) -> Iterator[int]:
    """Ever more tokens before this one, down to the first."""
    back = longest + 4
    while back < known:
        yield known - back
        back *= 2
    yield 0


def special_ids(tokenizer: PreTrainedTokenizerBase, strings: Collection[str]) -> dict[int, str]:
    """Special tokens that one of the strings is the text of. A text shows no special token."""
    return {
        i: token.content
        for i, token in tokenizer.added_tokens_decoder.items()
        if token.special and token.content in strings
    }
