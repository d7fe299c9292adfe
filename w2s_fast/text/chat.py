"""Chat messages, written out by a tokenizer's own template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from transformers import PreTrainedTokenizerBase

from w2s_fast.errors import InvalidRequest
from w2s_fast.text.encoding import check_unicode, encode_between

ChatMessage: TypeAlias = Mapping[str, str]


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[ChatMessage], name: str
) -> list[int]:
    """Token ids of messages, and of the beginning of an answer to them.

    Args:
        name: what errors call the model.

    Raises:
        InvalidRequest: not messages, no chat template, or one that fails on them.
    """
    for message in messages:
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise InvalidRequest(
                f"a chat message is {dict(message)!r}; allowed: a mapping with the strings "
                "'role' and 'content'"
            )
        check_unicode(message["content"])
    if tokenizer.chat_template is None:
        raise InvalidRequest(f"{name} has no chat template; give its prompt as a string")
    # Contents are rendered as marks no text holds, so that what the template wrote and what a user
    # wrote can be told apart.
    marks = [f"\ue000{i}\ue001" for i in range(len(messages))]
    marked = [{**m, "content": mark} for m, mark in zip(messages, marks)]
    try:
        text = tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template may raise anything
        raise InvalidRequest(f"the chat template of {name} failed: {error}") from error
    pieces, contents, rest = [], [], str(text)
    for mark, message in zip(marks, messages):
        if rest.count(mark) != 1:
            raise InvalidRequest(
                f"the chat template of {name} does not take these messages in order"
            )
        before, rest = rest.split(mark)
        pieces.append(before)
        contents.append(message["content"])
    return encode_between(tokenizer, [*pieces, rest], contents)
