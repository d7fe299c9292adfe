"""From growing texts to the tokens of another vocabulary than the one they were drawn from.

A text is encoded behind its prompt as a whole: what is new may change tokens before it, and what
the tokens of the whole are is what counts. So each text remembers a safe place near its end
(:class:`.cuts.Cuts`), and is encoded again from there on. All texts of a round stand in a few
strings for the tokenizer, one behind the other with a special token between them, since a string of
its own for each takes longer than what is in it.
"""

from __future__ import annotations

import json
import secrets
from array import array
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Tokenizer

from w2s_fast.errors import InvalidRequest
from w2s_fast.text.cuts import NOWHERE, SAMPLES, Cuts
from w2s_fast.text.encoding import TextEncoder, Written
from w2s_fast.text.special_tokens import SIGNS, common_prefix

_AT_ONCE = 128  # pieces in one string; several strings are encoded side by side
_LONG = 32  # characters of a piece that will hardly come again
_MOST_KNOWN = 200_000


class Translated(NamedTuple):
    """A prompt and what was said behind it so far, in another vocabulary.

    Attributes:
        written: the prompt. said: the response.
        ids: int32, the tokens of both; what starts them where the prompt is empty included.
        prompt: those of the prompt alone. start: where the response begins: behind the longest
            common prefix of both, at least 1.
        tail: the text from its last safe place on, where it is to be encoded again from; None:
            there is none. before: tokens before that place. guarded: whether the tail begins with
            the character before it, so that what comes behind does not begin a text.
    """

    written: Written
    said: str
    ids: array[int]
    prompt: array[int]
    start: int
    tail: str | None = None
    before: int = 0
    guarded: bool = True


class Grown(NamedTuple):
    """A text that has grown, and how many of its first tokens are those that it had before."""

    text: Translated
    common: int


class Translator:
    """Encodes growing texts for one model, with its tokenizer. One thread at a time."""

    def __init__(self, encoder: TextEncoder, vocab_size: int, bos_token_id: int | None) -> None:
        """``vocab_size``: ids from here on are refused. ``bos_token_id``: what a text starts from
        where its prompt is empty."""
        self._encoder = encoder
        self._vocab_size = vocab_size
        self._bos = bos_token_id
        self._pieces: _Pieces | None = None
        self._cuts: Cuts | None = None
        # Special tokens that eat the spaces behind them.
        added = encoder.tokenizer.added_tokens_decoder.values()
        self._strips = {token.content for token in added if token.special and token.rstrip}
        backend = encoder.specials.copy_that_reads_none()
        if backend is not None:
            parts = json.loads(backend.to_str())
            self._pieces = _Pieces(backend)
            self._cuts = _checked_cuts(parts, self._pieces)

    def begin(self, written: Written) -> Translated:
        """A prompt by itself.

        Raises:
            InvalidRequest: the tokenizer fails on it, or it is empty and there is no BOS.
        """
        ids = array("i", self._encoder.encode(written))
        if not ids:
            ids = array("i", [self._needed_bos()])
        whole = Translated(written, "", ids, ids, len(ids))
        return self._with_tail(whole)

    def extend(
        self, texts: Sequence[Translated], responses: Sequence[str]
    ) -> list[Grown | InvalidRequest]:
        """Each text with the response that it has now, or why that cannot be encoded.

        All in one call of the tokenizer, but for texts without a safe place.
        """
        found: list[Grown | InvalidRequest | None] = [None] * len(texts)
        growing: list[int] = []
        for i, (text, response) in enumerate(zip(texts, responses)):
            if response == text.said:
                found[i] = Grown(text, len(text.ids))
            elif text.tail is not None and response.startswith(text.said):
                growing.append(i)
        of_tails = self._from_tails([texts[i] for i in growing], [responses[i] for i in growing])
        for i, own in zip(growing, of_tails):
            found[i] = own
        return [
            self._whole(text, response) if own is None else own
            for own, text, response in zip(found, texts, responses)
        ]

    def _from_tails(
        self, texts: Sequence[Translated], responses: Sequence[str]
    ) -> Sequence[Grown | None]:
        """None where a text has to be encoded as a whole."""
        if not texts or self._pieces is None or self._cuts is None:
            return [None] * len(texts)
        split = self._cuts.split
        windows: list[str] = []
        guards: list[str] = []
        pieces: list[list[str]] = []
        for text, response in zip(texts, responses):
            window = (text.tail or "") + response[len(text.said) :]
            guard = window[0] if text.guarded else ""
            windows.append(window)
            guards.append(guard)
            pieces.append(split(window[len(guard) :], guard))
        try:
            encoded = self._pieces.of_texts(guards, pieces)
        except BaseException as error:
            _pass_on_interrupts(error)
            return [None] * len(texts)
        found: list[Grown | None] = []
        for text, response, window, own, (new, last) in zip(
            texts, responses, windows, pieces, encoded
        ):
            written, _, old, prompt, start, _, before, guarded = text
            common = before + common_prefix(old[before:], new)
            ids = old[:before] + new
            if common <= start:  # it may have changed the prompt's end
                start = common_prefix(prompt, ids)
            if start == 0 or (new and max(new) >= self._vocab_size):
                found.append(None)  # and the whole says why
                continue
            if len(own) > 1:
                window, guarded = own[-2][-1] + own[-1], True
            before = len(ids) - last
            grown = Translated(written, response, ids, prompt, start, window, before, guarded)
            found.append(Grown(grown, common))
        return found

    def _whole(self, text: Translated, response: str) -> Grown | InvalidRequest:
        try:
            ids = array("i", self._encoder.encode(text.written.followed_by(response)))
            start = common_prefix(text.prompt, ids)
            if start == 0:
                ids, start = array("i", [self._needed_bos()]) + ids, 1
            self._check(ids[start:])
        except InvalidRequest as error:
            return error
        whole = Translated(text.written, response, ids, text.prompt, start)
        return Grown(self._with_tail(whole), common_prefix(text.ids, ids))

    def _check(self, ids: array[int]) -> None:
        if ids and max(ids) >= self._vocab_size:
            raise InvalidRequest(
                f"a response holds token {max(ids)} for {self._encoder.name}; allowed: below "
                f"{self._vocab_size}"
            )

    def _needed_bos(self) -> int:
        if self._bos is None:
            raise InvalidRequest(
                f"the prompt is empty for {self._encoder.name}, which has no BOS token to start "
                "from; give at least one token"
            )
        return self._bos

    def _with_tail(self, text: Translated) -> Translated:
        """The text with a safe place near its end, if there is one behind its special tokens."""
        if self._pieces is None or self._cuts is None:
            return text
        whole = text.written.text + text.said
        begin, floor = max(text.written.special, key=lambda span: span[1], default=(0, 0))
        cut = self._cuts.last(whole, floor)
        guarded = cut != NOWHERE
        if not guarded:
            if floor == 0 or whole[begin:floor] in self._strips:
                return text
            cut = floor  # as behind the special token that ends there
        tail = whole[cut - guarded :]
        guard = tail[0] if guarded else ""
        try:
            ((ids, _),) = self._pieces.of_texts([guard], [[tail[len(guard) :]]])
        except BaseException as error:
            _pass_on_interrupts(error)
            return text
        before = len(text.ids) - len(ids)
        if before < 1 or text.ids[before:] != ids:
            return text
        return text._replace(tail=tail, before=before, guarded=guarded)


class _Pieces:
    """Encodes many pieces of texts at once; none of them begins a text.

    Most pieces are words that have come before: what they were is remembered.
    """

    def __init__(self, backend: Tokenizer) -> None:
        separator = "".join(chr(secrets.choice(SIGNS)) for _ in range(12))
        backend.add_special_tokens([AddedToken(separator, normalized=False, special=True)])
        self._backend = backend
        self._separator = separator
        self._id = backend.token_to_id(separator)
        self._guards: dict[str, int] = {}
        self._known: dict[str, array[int]] = {}

    def of_texts(
        self, guards: Sequence[str], texts: Sequence[Sequence[str]]
    ) -> list[tuple[array[int], int]]:
        """The tokens of texts that go on, and how many of them are of their last pieces.

        Args:
            guards: the character before each text; none where it stands behind a special token.
            texts: each in pieces with safe places between them.
        """
        if len(self._known) > _MOST_KNOWN:
            self._known.clear()
        known = self._known
        behind: dict[str, str] = {}  # of pieces that are to be encoded, the character before
        first: dict[str, None] = {}  # those before which there is none
        for guard, pieces in zip(guards, texts):
            before = guard
            for piece in pieces:
                if not before:
                    first[piece] = None
                elif piece not in known:
                    behind[piece] = before
                before = piece[-1:]
        encoded = self.encode([*first, *(before + piece for piece, before in behind.items())])
        of_first = dict(zip(first, encoded))
        long: dict[str, array[int]] = {}
        skipped = self._sizes(set(behind.values())) if behind else {}
        for (piece, before), ids in zip(behind.items(), encoded[len(first) :]):
            (known if len(piece) <= _LONG else long)[piece] = ids[skipped[before] :]
        found = []
        for guard, pieces in zip(guards, texts):
            ids = array("i")
            own = ids
            for i, piece in enumerate(pieces):
                if i == 0 and not guard:
                    own = of_first[piece]
                else:
                    own = known[piece] if len(piece) <= _LONG else long[piece]
                ids = ids + own
            found.append((ids, len(own)))
        return found

    def encode(self, pieces: Sequence[str]) -> list[array[int]]:
        """The tokens of each piece, as those of a text behind a special token."""
        between = self._separator
        strings = [
            between + between.join(pieces[i : i + _AT_ONCE])
            for i in range(0, len(pieces), _AT_ONCE)
        ]
        found: list[array[int]] = []
        for read in self._backend.encode_batch_fast(strings, add_special_tokens=False):
            ids = np.array(read.ids, np.int32)
            ends = [*np.flatnonzero(ids == self._id).tolist(), len(ids)]
            all_ids = array("i", ids.tobytes())
            found += [all_ids[a + 1 : b] for a, b in pairwise(ends)]
        return found

    def _sizes(self, signs: set[str]) -> dict[str, int]:
        """How many tokens each character is, where it begins a piece and a safe place follows."""
        missing = [sign for sign in signs if sign not in self._guards]
        if missing:
            for sign, ids in zip(missing, self.encode(missing)):
                self._guards[sign] = len(ids)
        return self._guards


def _checked_cuts(parts: dict[str, Any], pieces: _Pieces) -> Cuts | None:
    """Cuts as far as samples show that they are safe with this tokenizer."""
    try:
        cuts = Cuts(parts)
        while not _are_safe(cuts, pieces):
            if not cuts.take_fewer():
                return None
    except BaseException as error:
        _pass_on_interrupts(error)
        return None
    return cuts


def _are_safe(cuts: Cuts, pieces: _Pieces) -> bool:
    for whole in SAMPLES:
        safe = [at for at in range(1, len(whole)) if cuts.at(whole, at)]
        parts = [part for at in safe for part in (whole[:at], whole[at - 1 :], whole[at - 1])]
        ids, *rest = pieces.encode([whole, *parts])
        three = zip(rest[::3], rest[1::3], rest[2::3])
        if any(left + right[len(guard) :] != ids for left, right, guard in three):
            return False
    return True


def _pass_on_interrupts(error: BaseException) -> None:
    """Whatever a tokenizer raises, also when it panics, is a matter of its texts."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
