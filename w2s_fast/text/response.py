"""From the token ids of a response back to its text."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_CONTEXT_TOKENS = 8  # enough for a tokenizer to see that a response does not begin a text


def decode_response(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], response: Sequence[int]
) -> str:
    """The text that ``response`` adds to ``prompt``, without special tokens.

    Decoded behind the prompt's end, since many tokenizers drop the space that a text begins with.
    """
    context = list(prompt[-_CONTEXT_TOKENS:])
    before = _decode(tokenizer, context)
    whole = _decode(tokenizer, [*context, *response])
    if not before.endswith("\ufffd") and whole.startswith(before):
        return whole[len(before) :]
    return _decode(tokenizer, list(response))


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
