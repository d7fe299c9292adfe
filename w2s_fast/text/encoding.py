"""From strings to token ids; what a user wrote never becomes a special token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from w2s_fast.errors import InvalidRequest
from w2s_fast.text.special_tokens import Span, SpecialTokens

_LONGEST = 500  # characters of somebody else's error


@dataclass(frozen=True)
class Written:
    """A text, and what of it are special tokens.

    Attributes:
        special: where its special tokens stand; whatever else spells one is text.
        plain: no template was around it, so the tokenizer may put its BOS before it.
    """

    text: str
    special: Sequence[Span] = ()
    plain: bool = False

    def followed_by(self, text: str) -> Written:
        return replace(self, text=self.text + text)


class TextEncoder:
    """Encodes strings for one model, with one tokenizer.

    A text is encoded as one string, as the tokenizer itself would encode it, whoever wrote which
    part of it; so no token stands in it that the whole text would not have.
    """

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
        """``name``: what errors call the model. ``vocab_size``: ids from here on are refused."""
        self.name = name
        self.tokenizer = tokenizer
        self.specials = SpecialTokens(tokenizer)
        self._vocab_size = vocab_size

    def encode(self, written: Written) -> list[int]:
        """Token ids. What the tokenizer puts behind a text is left out: the text goes on.

        Raises:
            InvalidRequest: the tokenizer fails on it, or it holds a token the models do not have.
        """
        check_unicode(written.text, f"a text for {self.name}")
        with self._named():
            if self.specials.are_just(written.special, written.text):
                read = self.tokenizer(
                    written.text,
                    add_special_tokens=written.plain,
                    return_special_tokens_mask=True,
                )
                ids, added = list(read["input_ids"]), list(read["special_tokens_mask"])
            else:
                ids, added = self.specials.encode(
                    written.text, written.special, add_special_tokens=written.plain
                )
        if written.plain:
            ids = self._without_end(ids, added)
        return self._checked(ids)

    def encode_behind(self, text: str) -> list[int]:
        """Token ids of a text that goes on behind tokens whose text is not known.

        Some tokenizers put a space before a text's beginning, so it is encoded behind something.
        """
        for before in ("\n", "a"):
            try:
                first = self.encode(Written(before))
                both = self.encode(Written(before + text))
            except InvalidRequest:
                continue
            if both[: len(first)] == first:
                return both[len(first) :]
        return self.encode(Written(text))

    def _without_end(self, ids: list[int], added: Sequence[int]) -> list[int]:
        """All but an EOS that the tokenizer puts behind a text; of an empty text, its BOS."""
        if all(added):
            return ids[:1] if ids[:1] == [self.tokenizer.bos_token_id] else []
        return ids[: max(i for i, mark in enumerate(added) if not mark) + 1]

    def _checked(self, ids: list[int]) -> list[int]:
        if ids and max(ids) >= self._vocab_size:
            worst = max(ids)
            token = self.tokenizer.convert_ids_to_tokens(worst)
            raise InvalidRequest(
                f"a text for {self.name} holds token {token!r}, whose id {worst} is outside the "
                f"vocabulary; allowed: 0 to {self._vocab_size - 1}"
            )
        return ids

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Whatever a tokenizer raises, also when it panics, is a matter of one text."""
        try:
            yield
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise InvalidRequest(
                f"the tokenizer of {self.name} cannot encode a text: {brief(error)}"
            ) from error


def check_unicode(text: str, what: str) -> None:
    """InvalidRequest if ``text`` holds half a surrogate pair; says in ``what``."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{what} is not valid Unicode: {error}") from error


def brief(error: BaseException) -> str:
    """What an error says, or the beginning of it; as valid Unicode."""
    said = f"{type(error).__name__}: {error}".encode(errors="backslashreplace").decode()
    return said if len(said) <= _LONGEST else f"{said[:_LONGEST]}..."
