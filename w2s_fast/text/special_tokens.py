"""The special tokens of a tokenizer: where a text spells them, and a tokenizer nothing can spell.

A text may spell a special token because a template wrote it there, or because a user typed it.
Only the first is one. So the tokenizer is copied, and its special tokens get secret names in the
copy: where a template wrote one its secret name is put, and all else is text like any other.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any, TypeAlias

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

Span: TypeAlias = tuple[int, int]  # from, to: characters of a text

# Letters that hardly any text holds, that Python prints as they are, and that no normaliser
# changes: Tangut.
SIGNS = range(0x17000, 0x18700)


class SpecialTokens:
    """The special tokens of one tokenizer, as text.

    Other added tokens are left to the tokenizer: it reads them out of anybody's text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self.ids = {t.content: i for i, t in added.items() if t.special and t.content}
        for text, number in zip(tokenizer.all_special_tokens, tokenizer.all_special_ids):
            if number is not None:
                self.ids.setdefault(str(text), number)
        flags = {t.content: t for t in added.values()}
        # Only as a word of its own, or anywhere.
        words = [t for t in self.ids if t in flags and flags[t].single_word]
        anywhere = [t for t in self.ids if t not in words]
        alone = [rf"(?<!\w)(?:{longest_of(words)})(?!\w)"] if words else []
        self.pattern = any_of([*alone, longest_of(anywhere)])
        edges = {edge for token in self.ids for edge in (token[0], token[-1])}
        # The characters that special tokens begin or end with, as far as words have none of them.
        self.doubtful = any_of(re.escape(e) for e in edges if not e.isalnum() and not e.isspace())
        # Those that are looked for behind the normaliser, where another spelling may become one.
        normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
        self._normalize: Callable[[str], str] | None = None
        self._normalized: list[str] = []
        if normalizer is not None:
            self._normalize = normalizer.normalize_str
            normalized = [t for t in self.ids if t in flags and flags[t].normalized]
            self._normalized = [normalizer.normalize_str(t) for t in normalized]
        self._renamed: _Renamed | None = None

    @cached_property
    def any_case(self) -> re.Pattern[str]:
        """Special tokens, in whatever case of letters."""
        return re.compile(longest_of(self.ids), re.IGNORECASE)

    @cached_property
    def first(self) -> re.Pattern[str]:
        """The first character of each of them."""
        return re.compile(f"(?={self.any_case.pattern})(?s:.)", re.IGNORECASE)

    @cached_property
    def first_or_doubtful(self) -> re.Pattern[str]:
        return any_of([self.doubtful.pattern, self.first.pattern], re.IGNORECASE)

    def find(self, text: str, counts: Callable[[Span], bool] = lambda _: True) -> list[Span]:
        """Where special tokens stand in ``text``, of those that count: leftmost and longest."""
        found, at = [], 0
        while match := self.pattern.search(text, at):
            if counts(match.span()):
                found.append(match.span())
                at = match.end()
            else:
                at = match.start() + 1
        return found

    def are_just(self, written: Sequence[Span], text: str) -> bool:
        """Whether the tokenizer itself would see these special tokens in ``text``, and no more."""
        if self.find(text) != list(written):
            return False
        if not self._normalized or self._normalize is None:
            return True
        rest = "\n".join(between(text, written))
        as_read = self._normalize(rest)
        return not any(token in as_read for token in self._normalized)

    def encode(
        self, text: str, written: Sequence[Span], add_special_tokens: bool
    ) -> tuple[list[int], list[int]]:
        """Token ids, and for each whether the tokenizer added it; special only where written."""
        renamed = self._renamed_tokenizer()
        backend, names = renamed.backend, renamed.names
        tokens = [text[start:end] for start, end in written]
        pieces = between(text, written)
        if backend is not None:
            whole = pieces[0] + "".join(names[t] + p for t, p in zip(tokens, pieces[1:]))
            read = backend.encode(whole, add_special_tokens=add_special_tokens)
            return list(read.ids), list(read.special_tokens_mask)
        # No copy can be made of it: piece by piece, each as a text of its own.
        options = {"split_special_tokens": True, "return_special_tokens_mask": True}
        if not tokens:
            read = self._tokenizer(text, add_special_tokens=add_special_tokens, **options)
            return list(read["input_ids"]), list(read["special_tokens_mask"])
        ids: list[int] = []
        for token, piece in zip([None, *tokens], pieces):
            ids += [] if token is None else [self.ids[token]]
            if piece:
                ids += self._tokenizer(piece, add_special_tokens=False, **options)["input_ids"]
        return ids, [0] * len(ids)

    def copy_that_reads_none(self) -> Tokenizer | None:
        """A copy of the tokenizer's fast backend for which no text spells a special token.

        None where no copy gives the same ids.
        """
        backend = self._renamed_tokenizer().backend
        return None if backend is None else Tokenizer.from_str(backend.to_str())

    def _renamed_tokenizer(self) -> _Renamed:
        if self._renamed is None:
            self._renamed = _Renamed(self._tokenizer, self.ids)
        return self._renamed


class _Renamed:
    """A tokenizer's fast backend, copied, with secret names for its special tokens.

    Attributes:
        names: from each special token's text to its secret name.
        backend: None where no copy gives the same ids.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ids: dict[str, int]) -> None:
        secret = "".join(chr(secrets.choice(SIGNS)) for _ in range(12))
        self.names = {t: secret + _numeral(i) for i, t in enumerate(ids)}
        self.backend: Tokenizer | None = None
        original = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(original, Tokenizer):
            return
        try:
            parts = json.loads(original.to_str())
            self._rename(parts)
            backend = Tokenizer.from_str(json.dumps(parts))
        except Exception:  # parts written in Python cannot be copied, nor can what comes to be
            return
        backend.no_truncation()
        backend.no_padding()
        if all(backend.token_to_id(self.names[t]) == number for t, number in ids.items()):
            self.backend = backend

    def _rename(self, parts: dict[str, Any]) -> None:
        names = self.names
        for added in parts["added_tokens"]:
            added["content"] = names.get(added["content"], added["content"])
        model = parts["model"]
        vocabulary = model["vocab"]
        if isinstance(vocabulary, dict):
            model["vocab"] = {names.get(t, t): i for t, i in vocabulary.items()}
        else:
            model["vocab"] = [[names.get(t, t), score] for t, score in vocabulary]
        if model.get("unk_token") is not None:
            model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
        if "merges" in model:
            pairs = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
            model["merges"] = [[a, b] for a, b in pairs if not {a, b, a + b} & names.keys()]


def between(text: str, spans: Sequence[Span]) -> list[str]:
    """The pieces of ``text`` before, between and behind the spans."""
    edges = [0, *(edge for span in spans for edge in span), len(text)]
    return [text[start:end] for start, end in zip(edges[::2], edges[1::2])]


def any_of(alternatives: Iterable[str], flags: int = 0) -> re.Pattern[str]:
    """Matches the first alternative that fits; nothing, if there are none."""
    return re.compile("|".join(alternatives) or "(?!)", flags)


def longest_of(texts: Iterable[str]) -> str:
    """A pattern for the longest of some texts. What they begin with alike stands in it once:
    some tokenizers have thousands of special tokens."""
    distinct = sorted(set(texts))
    if not distinct:
        return "(?!)"
    shared = distinct[0][: common_prefix(distinct[0], distinct[-1])]
    rests = [text[len(shared) :] for text in distinct]
    branches = [longest_of(own) for _, own in groupby(filter(None, rests), key=_first)]
    if not branches:
        return re.escape(shared)
    return f"{re.escape(shared)}(?:{'|'.join(branches)}){'' if rests[0] else '?'}"


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many leading items agree."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _first(text: str) -> str:
    return text[0]


def _numeral(number: int) -> str:
    """A number as two signs."""
    return "".join(chr(SIGNS[digit]) for digit in divmod(number, len(SIGNS)))
