"""From the token ids of a response back to its text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

# Enough for a tokenizer to see that a response does not begin a text; then as many more as a
# character may have bytes, so that one of them begins with a whole character; then far more, to
# find text before special tokens; then what short prompts have.
_CONTEXT_TOKENS = (8, 9, 10, 11, 64, 5, 4, 3, 2, 1)
_LONGEST = max(_CONTEXT_TOKENS)
_BYTES = 4  # of a character, at most
_INCOMPLETE = "\ufffd"  # what decoders write for a character of which bytes are missing


def decode_response(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], response: Sequence[int]
) -> str:
    """The text that ``response`` adds to ``prompt``, without special tokens.

    Decoded behind the prompt's end, since many tokenizers drop the space that a text begins with.
    Where that end is no whole text (it begins or ends inside a character), behind another part of
    the prompt that is.
    """
    for context, before in _contexts(tokenizer, prompt):
        whole = _decode(tokenizer, [*context, *response])
        if whole.startswith(before):
            return whole[len(before) :]
    alone = _decode(tokenizer, response)
    if not alone.startswith(_INCOMPLETE):  # it does not go on with a character of the prompt
        before = _decode(tokenizer, prompt[-_LONGEST:])
        whole = _decode(tokenizer, [*prompt[-_LONGEST:], *response])
        if whole.startswith(before):
            return whole[len(before) :]
    return alone


def _contexts(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]
) -> Iterator[tuple[Sequence[int], str]]:
    """Parts of the prompt that are text and whole characters, with their text; the best first."""
    for end in range(len(prompt), max(0, len(prompt) - _BYTES), -1):
        for size in _CONTEXT_TOKENS:
            if size > end and size != _CONTEXT_TOKENS[0]:
                continue
            context = prompt[max(0, end - size) : end]
            before = _decode(tokenizer, context)
            if before and not before.startswith(_INCOMPLETE) and not before.endswith(_INCOMPLETE):
                yield context, before


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(
        tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )
