"""The texts of responses that grow, as far as they are certain: from tokens, a few at a time.

Only the end of a response is decoded again, behind tokens before it. A character whose bytes are
not all there is held back.

Where bytes are tokens, decoders read a run of them as one, and as no text at all if its last
character is not whole. What is whole in it is said all the same; should the run turn out to be no
text, it is taken back.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from w2s_fast.text.response import CONTEXT_TOKENS, INCOMPLETE, byte_tokens, decode_response


class Said(NamedTuple):
    """What a response says.

    Attributes:
        text: all that is certain. tokens: how many of its tokens are in it whole.
        beyond: characters at the text's end that come from tokens behind those.
    """

    text: str = ""
    tokens: int = 0
    beyond: int = 0


# A response that has got tokens: its prompt's, all of its own so far without one that ends it by
# itself, what was known of it, and whether nothing follows: then nothing is held back.
Grows: TypeAlias = tuple[Sequence[int], Sequence[int], Said, bool]


class GrowingTexts:
    """Decodes growing responses with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._bytes = byte_tokens(tokenizer)
        backend = getattr(tokenizer, "_tokenizer", None)
        plain = getattr(type(tokenizer), "_decode", None) is PreTrainedTokenizerFast._decode
        self._backend = backend if plain and isinstance(backend, Tokenizer) else None

    def extend(self, texts: Sequence[Grows]) -> list[Said | Exception]:
        """What each response says now; a tokenizer may raise anything."""
        growing = [i for i, (*_, ends) in enumerate(texts) if not ends]
        found: list[Said | Exception] = [said for _, _, said, _ in texts]
        for i, (prompt, tokens, _, ends) in enumerate(texts):
            if ends:
                try:
                    whole = decode_response(self._tokenizer, prompt, tokens)
                    found[i] = Said(whole, len(tokens))
                except Exception as error:
                    found[i] = error
        for i, own in zip(growing, self._grow([texts[i] for i in growing])):
            found[i] = own
        return found

    def _grow(self, texts: Sequence[Grows]) -> Sequence[Said | Exception]:
        contexts: dict[tuple[int, ...], int] = {}  # siblings have the same
        which: list[int] = []
        wholes: list[list[int]] = []
        ends: list[int] = []
        runs: list[str] = []
        for prompt, tokens, said, _ in texts:
            end = len(tokens)
            while end > said.tokens and tokens[end - 1] in self._bytes:
                end -= 1
            new = tokens[said.tokens : end]
            runs.append(_characters(bytes(self._bytes[token] for token in tokens[end:])))
            context = tuple(_last(prompt, tokens[: said.tokens], CONTEXT_TOKENS[0]))
            which.append(contexts.setdefault(context, len(contexts)))
            wholes.append([*context, *new])
            ends.append(end)
        try:
            decoded = self._decode([*map(list, contexts), *wholes])
        except Exception:  # of one of them: each by itself
            return [self._alone(*own) for own in zip(texts, ends, runs)]
        befores, behind = decoded[: len(contexts)], decoded[len(contexts) :]
        return [
            _said(text[2], end, whole[len(before) :], run)
            if before and not before.endswith(INCOMPLETE) and whole.startswith(before)
            else self._alone(text, end, run)
            for text, end, run, whole, before in zip(
                texts, ends, runs, behind, (befores[context] for context in which)
            )
        ]

    def _alone(self, text: Grows, end: int, run: str) -> Said | Exception:
        prompt, tokens, said, _ = text
        before = _last(prompt, tokens[: said.tokens], CONTEXT_TOKENS[-1])
        try:
            new = decode_response(self._tokenizer, before, tokens[said.tokens : end])
            return _said(said, end, new, run)
        except Exception as error:
            return error

    def _decode(self, sequences: list[list[int]]) -> list[str]:
        if self._backend is not None:
            return self._backend.decode_batch(sequences, skip_special_tokens=True)
        return [
            str(
                self._tokenizer.decode(
                    own, skip_special_tokens=True, clean_up_tokenization_spaces=False
                )
            )
            for own in sequences
        ]


def _said(said: Said, end: int, new: str, run: str) -> Said:
    """What a response says.

    Args:
        new: what the tokens up to ``end`` say beyond those that are whole in what was ``said``.
        run: characters that are whole in a run of bytes behind.
    """
    whole = said.text[: len(said.text) - said.beyond]
    certain = new.rstrip(INCOMPLETE)
    if len(certain) == len(new):
        return Said(whole + new + run, end, len(run))
    return Said(whole + certain, said.tokens, len(certain))


def _characters(run: bytes) -> str:
    """Those that are whole, in bytes that may go on; none if the bytes are no text."""
    try:
        # One that is written, and no stand-in, is held back like those.
        return codecs.getincrementaldecoder("utf-8")().decode(run).rstrip(INCOMPLETE)
    except UnicodeDecodeError:
        return ""


def _last(prompt: Sequence[int], tokens: Sequence[int], count: int) -> list[int]:
    own = list(tokens[-count:])
    missing = count - len(own)
    return [*prompt[-missing:], *own] if missing else own
