"""Where a text can be cut so that its tokens are those of its pieces, one behind the other.

A text that grows is encoded again only from such a place on. A place is safe if no token of the
vocabulary holds the characters on both sides of it: then no merge of BPE crosses it, and every way
to write the text with pieces goes through it. That says nothing of how a tokenizer splits a text
into words first, so only places are taken where all that are known begin a word anew, or where it
does not matter: before a space, and for BPE, whose words may be cut, inside of one, too. Samples
show whether it holds for the tokenizer at hand; if not, its texts are not cut.
"""

from __future__ import annotations

import json
import re
import unicodedata
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer

SPACE = "\u2581"  # how vocabularies of characters write one; a text may hold it, too
# What only changes a text's edges, or how a space is written.
_AT_EDGES = ("Prepend", "Strip")
NOWHERE = -1
_MOST_PAIRS = 100_000
_NORMALIZED = 2  # characters on each side of a place that a normaliser must leave as they are

# Scripts with and without spaces, combining marks, joiners, code, numbers, and runs of spaces.
SAMPLES = (
    "The quick brown fox, it's said, won't jump over 12345678 lazy dogs -- or will it?",
    "A line.\n\nAnother one:\n\t- an item (1,234.56)\n    return x[0]  # why\r\n   \n  end",
    "\u4eca\u5929\u5929\u6c14\u5f88\u597d\uff0c\u6211\u4eec\u53bb\u516c\u56ed\u3002"
    "\u6771\u4eac\u3078\u884c\u304d\u307e\u3057\u305f\u3002\ub098\ub294 \ud559\uc0dd\uc774\ub2e4.",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645 \u0661\u0662\u0663, "
    "\u05e9\u05b8\u05dc\u05d5\u05b9\u05dd \u05e2\u05d5\u05dc\u05dd",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e \u0965 "
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea\U0001f44d\U0001f3fd! "
    "caf\u00e9 cafe\u0301 na\u00efve I'LL we'RE XmlHTTPRequest foo_bar2baz",
    "aaaaaaaabbbb ==== ---- ....  ....   x   y \u00bd \u2167 \u00a0 \u3000z",
)


class Cuts:
    """The safe places of texts, for one tokenizer."""

    def __init__(self, parts: dict[str, Any]) -> None:
        """``parts``: of a backend in which no text spells a special token, as it writes itself; see
        :mod:`.special_tokens`."""
        model = parts["model"]
        added = [a for a in parts["added_tokens"] if not a["special"]]
        self._safe: dict[str, bool] = {}  # of pairs of characters, as far as they were asked for
        self._pairs: set[str] = set()
        self._partial: set[tuple[bytes | str, bytes | str]] = set()
        self._known: frozenset[str] | None = None  # characters with tokens; None: any may be cut at
        self._normalizer = _beyond_edges(parts["normalizer"])
        self._spaces = not any(a["lstrip"] or a["rstrip"] or a["single_word"] for a in added)
        self._words = (
            self._spaces
            and model["type"] == "BPE"
            and not (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"))
        )
        names = (
            model["vocab"] if isinstance(model["vocab"], dict) else [t for t, _ in model["vocab"]]
        )
        if _reads_bytes(parts):
            byte_of = {sign: byte for byte, sign in enumerate(byte_signs())}
            for name in names:
                if all(sign in byte_of for sign in name):
                    self._add_bytes(bytes(byte_of[sign] for sign in name))
                else:
                    self._add(name)
        else:
            for name in names:
                self._add(name.replace(SPACE, " "))
            if not model.get("byte_fallback"):
                self._known = frozenset(n.replace(SPACE, " ") for n in names if len(n) == 1)
        for token in added:
            self._add(token["content"])
        # Where spaces are safe behind any character, or behind those that no normaliser takes away.
        signs = {pair[0] for pair in self._pairs if pair[1] == " "}
        tails = any(right in (" ", b" ") for _, right in self._partial)
        kept = rf"[^\s{SPACE}]" if self._normalizer is None else "[A-Za-z0-9]"
        always = not tails and all(sign.isspace() for sign in signs)
        self._split = re.compile(f"(?<={kept})(?= )") if always else None

    def split(self, text: str, before: str) -> list[str]:
        """A text that may yet grow in pieces, with safe places between them.

        The last piece begins at the last safe place.

        Args:
            before: the character before the text; none if it begins one.
        """
        pieces = [text] if self._split is None or not self._spaces else self._split.split(text)
        end = pieces[-1]
        if len(pieces) > 1:
            before = pieces[-2][-1]
        cut = self.last(before + end, len(before))
        if cut == NOWHERE:
            return pieces
        cut -= len(before)
        return [*pieces[:-1], end[:cut], end[cut:]]

    def _add(self, text: str) -> None:
        self._pairs.update(map("".join, pairwise(text)))

    def _add_bytes(self, token: bytes) -> None:
        """Pairs of a token that may begin and end inside of a character."""
        begin = next((i for i, byte in enumerate(token[:4]) if byte & 0xC0 != 0x80), len(token))
        end = len(token)
        for back in range(1, min(3, end - begin) + 1):
            lead = token[end - back]
            if lead & 0xC0 == 0xC0:
                whole = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
                end -= back if whole > back else 0
                break
        text = token[begin:end].decode(errors="replace")
        self._add(text)
        head, tail = token[:begin], token[end:]
        if head and text:
            self._partial.add((head, text[0]))
        if tail and text:
            self._partial.add((text[-1], tail))
        if head and tail and not text:
            self._partial.add((head, tail))

    def take_fewer(self) -> bool:
        """From here on take no places inside of words, or else none at all; whether there were."""
        self._words, self._spaces, before = False, self._words, self._spaces
        self._safe.clear()
        return before

    def last(self, text: str, behind: int) -> int:
        """The last safe place behind a position of a text that may yet grow; NOWHERE: none is.

        It is safe whatever follows.
        """
        safe = self._safe
        for cut in range(len(text) - 1, behind, -1):
            pair = text[cut - 1 : cut + 1]
            found = safe.get(pair)
            if found is None:
                found = self._remember(pair)
            if found and self._is_kept(text, cut):
                return cut
        return NOWHERE

    def at(self, text: str, cut: int) -> bool:
        """Whether a place is safe that has a character on each side."""
        return self._is_safe(text[cut - 1 : cut + 1]) and self._is_kept(text, cut)

    def _remember(self, pair: str) -> bool:
        if len(self._safe) >= _MOST_PAIRS:
            self._safe.clear()
        self._safe[pair] = found = self._is_safe(pair)
        return found

    def _is_safe(self, pair: str) -> bool:
        """Whether a text may be cut between two characters, but for what a normaliser does."""
        before, after = pair[0], pair[1]
        if after == " ":
            return (
                self._spaces
                and not before.isspace()
                and not self._in_a_token(before, after)
                and self._shows(before)
            )
        # Behind a mark it may matter what stands before that: 'd is a word for many, and x'd, too.
        if not self._words or not before.isalpha() or (after.isspace() and after != "\n"):
            return False
        if self._known is not None and not {before, after} <= self._known:
            return False
        return not self._in_a_token(before, after)

    def _shows(self, before: str) -> bool:
        """Whether a normaliser leaves something of a character, and no space."""
        if self._normalizer is None:
            return True
        left = self._normalizer.normalize_str(before)
        return bool(left) and not left[-1].isspace()

    def _in_a_token(self, before: str, after: str) -> bool:
        if before + after in self._pairs or SPACE in (before, after):
            return True
        if not self._partial:
            return False
        left, right = before.encode(errors="replace"), after.encode(errors="replace")
        lefts = [before, *(left[-k:] for k in range(1, len(left)))]
        rights = [after, *(right[:k] for k in range(1, len(right)))]
        return any((a, b) in self._partial for a in lefts for b in rights)

    def _is_kept(self, text: str, cut: int) -> bool:
        """Whether a normaliser does to the text around a place what it does to both sides of it."""
        if self._normalizer is None or text[cut] == " ":
            return True
        around = text[max(0, cut - _NORMALIZED) : cut + _NORMALIZED]
        if cut + _NORMALIZED > len(text) or unicodedata.combining(text[cut]):
            return False
        return bool(self._normalizer.normalize_str(around) == around)


def byte_signs() -> list[str]:
    """The character that vocabularies of bytes write each byte as: printable ones as themselves."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in shown else next(others)) for byte in range(256)]


def _reads_bytes(parts: dict[str, Any]) -> bool:
    """Whether a tokenizer's pieces are written in :func:`byte_signs`."""
    found: list[dict[str, Any]] = [parts["pre_tokenizer"] or {}, parts["normalizer"] or {}]
    found += [*(found[0].get("pretokenizers") or ()), *(found[1].get("normalizers") or ())]
    return any(part.get("type") == "ByteLevel" for part in found)


def _beyond_edges(normalizer: dict[str, Any] | None) -> Any:
    """A normaliser without what it does to a text's edges and spaces; None: it does no more."""
    if normalizer is None:
        return None
    parts = normalizer.get("normalizers") if normalizer["type"] == "Sequence" else [normalizer]
    rest = [
        part
        for part in parts or ()
        if part["type"] not in (*_AT_EDGES, "ByteLevel")
        and not (part["type"] == "Replace" and part["pattern"] == {"String": " "})
    ]
    if not rest:
        return None
    model = {"type": "WordLevel", "vocab": {"x": 0}, "unk_token": "x"}
    whole: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": rest},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": model,
    }
    return Tokenizer.from_str(json.dumps(whole)).normalizer
