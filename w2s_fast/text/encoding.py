"""From strings to token ids; what a user wrote never becomes a special token."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from w2s_fast.errors import InvalidRequest


def encode_plain(
    tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool
) -> list[int]:
    """Text of a user: what looks like a special token is encoded as the characters it is."""
    ids: list[int] = tokenizer(
        text, add_special_tokens=add_special_tokens, split_special_tokens=True
    )["input_ids"]
    return ids


def check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"a text is not valid Unicode: {error}") from error


def encode_between(
    tokenizer: PreTrainedTokenizerBase, pieces: Sequence[str], texts: Sequence[str]
) -> list[int]:
    """Tokens of pieces[0] texts[0] pieces[1] ...: special tokens only where a piece has them.

    Encoded as one string, as the model was trained, unless a text spells a special token.
    """
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    if not any(token in text for token in special for text in texts):
        joined = "".join(piece + text for piece, text in zip(pieces, [*texts, ""]))
        ids: list[int] = tokenizer(joined, add_special_tokens=False)["input_ids"]
        return ids
    ids = []
    for piece, text in zip(pieces, [*texts, ""]):
        ids += tokenizer(piece, add_special_tokens=False)["input_ids"] if piece else []
        ids += encode_plain(tokenizer, text, add_special_tokens=False) if text else []
    return ids
