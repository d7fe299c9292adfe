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
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer

from w2s_fast.errors import InvalidRequest
from w2s_fast.text.cuts import NOWHERE, SAMPLES, SPACE, Cuts, sizes_of_tokens
from w2s_fast.text.encoding import TextEncoder, Written
from w2s_fast.text.special_tokens import SIGNS, common_prefix

_AT_ONCE = 128  # pieces in one string; several strings are encoded side by side
_LONG = 32  # characters of a tail, before a place further on is worth encoding for
_NEVER = 1 << 40


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
            self._pieces = _Pieces(backend, sizes_of_tokens(parts))
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
        windows = [
            (text.tail or "") + response[len(text.said) :]
            for text, response in zip(texts, responses)
        ]
        try:
            encoded = self._pieces.encode(windows)
            guards = self._pieces.guards({window[0] for window in windows})
            skipped = [
                guards[window[0]] if text.guarded else 0 for text, window in zip(texts, windows)
            ]
            cuts, counts = self._last_cuts(texts, windows, encoded, skipped)
        except BaseException as error:
            _pass_on_interrupts(error)
            return [None] * len(texts)
        found: list[Grown | None] = []
        for text, response, window, ids, skip, cut, count in zip(
            texts, responses, windows, encoded, skipped, cuts, counts
        ):
            written, _, old, prompt, start, _, before, guarded = text
            new = ids[skip:]
            common = before + common_prefix(old[before:], new)
            ids = old[:before] + new
            if common <= start:  # it may have changed the prompt's end
                start = common_prefix(prompt, ids)
            if start == 0 or (new and max(new) >= self._vocab_size):
                found.append(None)  # and the whole says why
                continue
            if cut != NOWHERE:
                window, before, guarded = window[cut - 1 :], before + count, True
            grown = Translated(written, response, ids, prompt, start, window, before, guarded)
            found.append(Grown(grown, common))
        return found

    def _last_cuts(
        self,
        texts: Sequence[Translated],
        windows: Sequence[str],
        encoded: Sequence[array[int]],
        skipped: Sequence[int],
    ) -> tuple[list[int], list[int]]:
        """The last safe place of each window, and how many tokens come before it: of those behind
        the first ``skipped``."""
        assert self._pieces is not None and self._cuts is not None
        last, sizes = self._cuts.last, self._pieces.sizes
        cuts = [NOWHERE] * len(windows)
        counts = [0] * len(windows)
        behind = [_NEVER] * len(windows)
        apart: list[int] = []
        for i, (window, text) in enumerate(zip(windows, texts)):
            if sizes is not None and SPACE not in window:
                cut = cuts[i] = last(window, text.guarded)
                if cut != NOWHERE:
                    behind[i] = len(window[cut:].encode())
            elif len(window) > _LONG:
                cuts[i] = last(window, text.guarded)
                apart += [i] * (cuts[i] != NOWHERE)
        if sizes is not None:
            counts = _counts_of(encoded, skipped, sizes, behind)
        if apart:  # nothing says how long a token's text is: what comes before is encoded, too
            before = self._pieces.encode([windows[i][: cuts[i]] for i in apart])
            for i, ids in zip(apart, before):
                counts[i] = len(ids) - skipped[i]
        return [cut if c else NOWHERE for cut, c in zip(cuts, counts)], counts

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
        try:
            (ids,) = self._pieces.encode([tail])
            ids = ids[self._pieces.guards({tail[0]})[tail[0]] if guarded else 0 :]
        except BaseException as error:
            _pass_on_interrupts(error)
            return text
        before = len(text.ids) - len(ids)
        if before < 1 or text.ids[before:] != ids:
            return text
        return text._replace(tail=tail, before=before, guarded=guarded)


def _counts_of(
    encoded: Sequence[array[int]],
    skipped: Sequence[int],
    sizes: NDArray[np.int64],
    behind: Sequence[int],
) -> list[int]:
    """How many tokens behind the first ``skipped`` come before as many bytes at the end; 0: none.

    Counted from the end, for a space that nobody wrote may stand at the beginning.
    """
    flat = np.frombuffer(b"".join(encoded), np.int32)
    ends = np.cumsum([len(own) for own in encoded])
    total = np.concatenate([[0], np.cumsum(sizes[flat])])
    first = np.concatenate([[0], ends[:-1]]) + skipped
    target = total[ends] - behind
    at = np.searchsorted(total, target)
    found = np.where((at > first) & (total[at] == target), at - first, 0)
    counts: list[int] = found.tolist()
    return counts


class _Pieces:
    """Encodes many pieces of texts at once; none of them begins a text.

    Attributes:
        sizes: int64 [V], the bytes of each token's text; None: the tokenizer does not keep a text
            as it is, so they do not tell where in it a token stands.
    """

    def __init__(self, backend: Tokenizer, sizes: NDArray[np.int64] | None) -> None:
        separator = "".join(chr(secrets.choice(SIGNS)) for _ in range(12))
        backend.add_special_tokens([AddedToken(separator, normalized=False, special=True)])
        self.sizes = sizes
        self._backend = backend
        self._separator = separator
        self._id = backend.token_to_id(separator)
        self._guards: dict[str, int] = {}

    def encode(self, pieces: Sequence[str]) -> list[array[int]]:
        """The tokens of each piece."""
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

    def guards(self, signs: set[str]) -> dict[str, int]:
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
