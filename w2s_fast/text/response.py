"""From the token ids of a response back to its text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

# Enough for a tokenizer to see that a response does not begin a text; or far more, to find text
# before special tokens.
CONTEXT_TOKENS = (8, 64)
INCOMPLETE = "\ufffd"  # what decoders write for a character of which bytes are missing
BYTE = re.compile("<0x[0-9A-F]{2}>")  # a byte as a token, in vocabularies of characters


def decode_response(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], response: Sequence[int]
) -> str:
    """The text that ``response`` adds to ``prompt``, without special tokens.

    Decoded behind the prompt's end, since many tokenizers drop the space that a text begins with.
    A character that the prompt begins and the response ends belongs to neither: the response
    has replacement characters for its bytes.
    """
    alone = _decode(tokenizer, response)
    context: Sequence[int] = ()
    before = ""
    for size in CONTEXT_TOKENS:
        if not before:
            context = prompt[-size:]
            before = _decode(tokenizer, context)
    whole = _decode(tokenizer, [*context, *response])
    if not whole.startswith(before):
        return alone
    behind = whole[len(before) :]
    # Where the context's last character is not whole, bytes of the response may be taken for a
    # part of it; what comes before all of its text is a space that was dropped.
    return behind if not before.endswith(INCOMPLETE) or behind.endswith(alone) else alone


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(
        tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )


def open_bytes(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> int:
    """How many tokens at the end are single bytes.

    Decoders with a fallback to bytes decode a run of them as one, to replacement characters
    throughout if any is wrong: its text is known when the run is over.
    """
    for behind, token in enumerate(reversed(tokens)):
        name = tokenizer.convert_ids_to_tokens(token)
        if not (isinstance(name, str) and BYTE.fullmatch(name)):
            return behind
    return len(tokens)


def byte_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, int]:
    """From ids to bytes, where characters without a token are written in bytes."""
    names = tokenizer.get_vocab().items()
    return {i: int(name[1:-1], 16) for name, i in names if BYTE.fullmatch(name)}
