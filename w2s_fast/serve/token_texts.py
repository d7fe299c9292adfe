"""What single tokens look like in an answer, and where they stand in its text."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from w2s_fast.text import INCOMPLETE

_WINDOW = 16  # tokens that are decoded together, behind as many that are known


class TokenTexts:
    """Tokens of one text as strings.

    A token that is a part of a character, or a special one, is shown by its name.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(token_ids)

    def text(self, place: int, token: int | None = None) -> str:
        """Of the token there, or of another one in its place."""
        token = self._ids[place] if token is None else token
        # Behind the token before it: alone, many lose the space that they begin with.
        before = self._ids[place - 1 : place] if place else []
        context = self._decode(before)
        both = self._decode([*before, token])
        shown = both[len(context) :] if both.startswith(context) else self._decode([token])
        return shown if shown and INCOMPLETE not in shown else self.name(token)

    def name(self, token: int) -> str:
        """As the vocabulary has it."""
        return str(self._tokenizer.convert_ids_to_tokens(token))

    def texts(self, places: range) -> list[str]:
        return [self.text(place) for place in places]

    def offsets(self, places: range, begin: int) -> list[int]:
        """Where each token's text begins, in characters, the first of the places at ``begin``."""
        found: list[int] = []
        for start in range(places.start, places.stop, _WINDOW):
            known = max(0, start - _WINDOW)
            context = len(self._decode(self._ids[known:start]))
            stop = min(start + _WINDOW, places.stop)
            for place in range(start, stop):
                found.append(begin + len(self._decode(self._ids[known:place])) - context)
            begin += len(self._decode(self._ids[known:stop])) - context
        return found

    def _decode(self, ids: Sequence[int]) -> str:
        return str(
            self._tokenizer.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )
