"""Where a text and its parts end by strings, by their definition: looking at all of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from w2s_fast.text import decode_response


def text_end(
    tokenizer: Any, prompt: list[int], tokens: list[int], stops: Sequence[str], least: int = 0
) -> tuple[int, str, str] | None:
    """How many tokens are kept, the text, and the stop string; None: the text does not end."""
    texts = [decode_response(tokenizer, prompt, tokens[:k]) for k in range(len(tokens) + 1)]
    whole = texts[-1]
    found = []
    for stop in stops:
        for start in range(len(whole)):
            end = start + len(stop)
            if whole.startswith(stop, start) and end > len(texts[min(least, len(tokens))]) * (
                least > 0
            ):
                found.append((end, 0, start, stop))
    special = {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    for at, token in enumerate(tokens):
        if special.get(token) in stops and at >= least:
            found.append((len(texts[at]), 1, at, special[token]))
    if not found:
        return None
    end, by_token, at, stop = min(found)
    if by_token:
        return at, texts[at], stop
    # The last token before which the text is a part of what comes before the stop string.
    kept = max(
        k
        for k, text in enumerate(texts)
        if len(text) <= at
        and whole.startswith(text)
        and not any(special.get(t) in stops and i >= least for i, t in enumerate(tokens[:k]))
    )
    return kept, whole[:at], stop


def completes(tokenizer: Any, prompt: list[int], tokens: list[int], strings: Sequence[str]) -> bool:
    """Whether a string is complete with the last token, and was not before."""
    special = {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    if special.get(tokens[-1]) in strings:
        return True
    *before, text = (
        decode_response(tokenizer, prompt, tokens[:k]).rstrip("\ufffd")
        for k in range(len(tokens) + 1)
    )
    shown = max(map(len, before))
    return any(
        text.startswith(string, start) and start + len(string) > shown
        for string in strings
        for start in range(len(text))
    )
