"""Which special tokens in what a template wrote come from the template, and which from a request.

What the template wrote does not say. So it writes again, from a request whose doubtful characters
are exchanged for signs, or have signs put beside them: where it writes the same text but for the
signs, these say what came from the request.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import Any

from w2s_fast.errors import InvalidRequest
from w2s_fast.text.special_tokens import SIGNS, Span, SpecialTokens, any_of


def written_by_template(
    specials: SpecialTokens, given: Any, text: str, write: Callable[[Any], str]
) -> list[Span]:
    """Where the template's own special tokens stand in ``text``.

    Args:
        given: strings, in mappings and lists: all that the template is given.
        text: ``write(given)``.

    Raises:
        InvalidRequest: a string spells a special token, and the template does with it what leaves
            open whose it is.
    """
    strings = list(_strings(given))
    spelled = any(map(specials.any_case.search, strings))
    found = specials.find(text)
    if not found or not (spelled or any(map(specials.doubtful.search, strings))):
        return found
    free = _free_signs("".join([*strings, text]))

    def at_signs(change: Callable[[str], str], signs: Mapping[str, str]) -> set[int] | None:
        """Where ``text`` has signs when the strings are changed; None if else it differs."""
        try:
            marked = write(change_strings(given, change))
        except InvalidRequest:  # the template minds the signs
            return None
        if any_of(signs).sub(lambda m: signs[m[0]], marked) != text:
            return None
        offsets = accumulate((len(signs.get(c, c)) for c in marked), initial=0)
        return {i for i, c in zip(offsets, marked) if c in signs}

    # First by the characters that special tokens begin or end with. A token that came about where
    # strings meet, or where a template changed them, is seen so too.
    exchange = _Exchange(specials.first_or_doubtful, free)
    theirs = at_signs(exchange, exchange.signs)
    if theirs is not None:
        return specials.find(text, lambda s: theirs.isdisjoint((s[0], s[1] - 1)))
    if not spelled:
        return found
    # A template that looks for such characters may yet leave whole special tokens alone.
    exchange = _Exchange(specials.first, free)
    begun = at_signs(exchange, exchange.signs)
    if begun is not None:
        return specials.find(text, lambda s: s[0] not in begun)
    # Or it looks for them, and cuts the text there.
    sign, either = next(free), specials.any_case
    before = at_signs(lambda s: either.sub(lambda m: sign + m[0], s), {sign: ""})
    after = at_signs(lambda s: either.sub(lambda m: m[0] + sign, s), {sign: ""})
    if before is None and after is None:
        raise InvalidRequest(
            "a string of the request spells a special token, and the chat template does with it "
            "what leaves open which special tokens are its own; leave the token out"
        )
    return specials.find(
        text,
        lambda s: (
            (before is not None and s[0] not in before) or (after is not None and s[1] not in after)
        ),
    )


class _Exchange:
    """Exchanges characters for signs; ``signs`` says which character each stands for."""

    def __init__(self, pattern: re.Pattern[str], free: Iterator[str]) -> None:
        self.signs: dict[str, str] = {}
        self._pattern = pattern
        self._free = free
        self._sign_of: dict[str, str] = {}

    def __call__(self, text: str) -> str:
        return self._pattern.sub(lambda match: self._sign(match[0]), text)

    def _sign(self, character: str) -> str:
        if character not in self._sign_of:
            sign = next(self._free)
            self._sign_of[character], self.signs[sign] = sign, character
        return self._sign_of[character]


def change_strings(given: Any, change: Callable[[str], str]) -> Any:
    """A copy of strings in mappings, lists and tuples, keys as well as values, each changed."""
    if isinstance(given, str):
        return change(given)
    if isinstance(given, Mapping):
        return {change_strings(k, change): change_strings(v, change) for k, v in given.items()}
    if isinstance(given, (list, tuple)):
        return type(given)(change_strings(item, change) for item in given)
    return given


def _strings(given: Any) -> Iterator[str]:
    if isinstance(given, str):
        yield given
    elif isinstance(given, Mapping):
        for key, value in given.items():
            yield from (*_strings(key), *_strings(value))
    elif isinstance(given, (list, tuple)):
        for item in given:
            yield from _strings(item)


def _free_signs(text: str) -> Iterator[str]:
    """Signs that ``text`` does not hold."""
    held = set(text)
    yield from (sign for sign in map(chr, SIGNS) if sign not in held)
    raise InvalidRequest("a request holds all Tangut letters, none is left to stand for others")
