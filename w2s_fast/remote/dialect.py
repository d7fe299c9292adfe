"""Dialect: what a server takes, and the bodies that it is sent; and what stands in its answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from w2s_fast.remote.prompt import RemotePrompt
from w2s_fast.result import Sample

Body = dict[str, Any]
Way = Literal["continue_final_message", "prefix", "plain"]
WAYS: tuple[Way, ...] = get_args(Way)
COMPLETIONS, CHAT = "/completions", "/chat/completions"
# Of sampling: fields that not every server takes.
OPTIONAL = frozenset(("top_k", "min_p", "seed"))


@dataclass(frozen=True)
class Dialect:
    """What a server takes.

    Attributes:
        texts, messages: whether it has the route for them.
        continuation: how a chat goes on with its last message.
        echoes: whether what it answers then begins with that message.
        optional: those of ``OPTIONAL`` that it does not refuse.
        length: what it calls the most tokens of an answer in a chat; of texts it is ``max_tokens``.
        packed: it takes ``top_k`` and ``min_p`` in ``generation_config`` alone, a JSON text, and
            draws only where that says so, as transformers' own server does.
    """

    texts: bool
    messages: bool
    continuation: Way = "plain"
    echoes: bool = False
    optional: frozenset[str] = OPTIONAL
    length: str = "max_tokens"
    packed: bool = False

    def route_of(self, prompt: RemotePrompt) -> str:
        """The route that samples behind this prompt are drawn by."""
        return COMPLETIONS if isinstance(prompt.content, str) and self.texts else CHAT

    def length_of(self, route: str) -> str:
        """What the most tokens of an answer are called there."""
        return self.length if route == CHAT else "max_tokens"

    def body(self, prompt: RemotePrompt, behind: str) -> Body:
        """What is asked, but for the model, and how many samples of which length."""
        taken = self._sampling(prompt)
        if self.route_of(prompt) == COMPLETIONS:
            return {"prompt": f"{prompt.content}{behind}", **taken}
        return {**self.chat(prompt, behind), **prompt.options, **taken}

    def _sampling(self, prompt: RemotePrompt) -> Body:
        taken = {
            name: value
            for name, value in prompt.sampling.items()
            if name in self.optional or name not in OPTIONAL
        }
        if not self.packed:
            if taken.get("top_k") == 0:
                taken["top_k"] = -1  # how most servers write "all", and some refuse 0
            return taken
        inner: Body = {name: taken.pop(name) for name in ("top_k", "min_p") if name in taken}
        inner["do_sample"] = not prompt.greedy
        return {**taken, "generation_config": json.dumps(inner)}

    def chat(self, prompt: RemotePrompt, behind: str) -> Body:
        """Messages, the last of which the answer goes on with where there is one to go on with."""
        content = prompt.content
        given = [{"role": "user", "content": content}] if isinstance(content, str) else content
        messages: list[dict[str, Any]] = [dict(message) for message in given]
        if not (behind or prompt.continues):
            return {"messages": messages}
        if prompt.continues:
            messages[-1]["content"] = f"{messages[-1].get('content') or ''}{behind}"
        else:
            messages.append({"role": "assistant", "content": behind})
        if self.continuation == "continue_final_message":
            return {
                "messages": messages,
                "continue_final_message": True,
                "add_generation_prompt": False,
            }
        if self.continuation == "prefix":
            messages[-1]["prefix"] = True
        return {"messages": messages}

    def samples(
        self, prompt: RemotePrompt, behind: str, answer: Mapping[str, Any], max_tokens: int
    ) -> list[Sample]:
        """The samples of an answer; ValueError: it is none."""
        choices = answer.get("choices")
        if not isinstance(choices, list):
            raise ValueError("an answer without choices")
        chat = self.route_of(prompt) == CHAT
        found = [_text_of(choice, chat) for choice in choices]
        if chat and self.echoes and (behind or prompt.continues):
            before = self.chat(prompt, behind)["messages"][-1]["content"]
            found = [(text.removeprefix(before), reason) for text, reason in found]
        tokens = _shared_out(found, _number(answer.get("usage"), "completion_tokens"), max_tokens)
        return [Sample(text, reason, own) for (text, reason), own in zip(found, tokens)]


def _text_of(choice: Any, chat: bool) -> tuple[str, str]:
    if not isinstance(choice, Mapping):
        raise ValueError("a choice that is none")
    text = choice.get("text")
    if chat:
        message = choice.get("message")
        text = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(text, list):  # in parts
            parts = (part.get("text") for part in text if isinstance(part, Mapping))
            text = "".join(part for part in parts if isinstance(part, str))
    if text is not None and not isinstance(text, str):
        raise ValueError("a choice whose text is none")
    # Without a reason it is not known to have ended.
    return text or "", str(choice.get("finish_reason") or "length")


def _shared_out(
    found: Sequence[tuple[str, str]], all_tokens: int | None, max_tokens: int
) -> list[int]:
    """How many tokens each sample has: those cut off as many as they may, others by their lengths.

    ``all_tokens``: of all, as the server counts; None: it does not say.
    """
    cut = [reason == "length" for _, reason in found]
    sizes = [len(text.encode("utf-8", "replace")) for text, _ in found]
    if all_tokens is None:  # four bytes are a token, or so
        return [max_tokens if c else min(max_tokens, -(-s // 4) + 1) for c, s in zip(cut, sizes)]
    full = cut
    most = max_tokens
    if not most * sum(full) <= all_tokens <= most * len(found):  # it has limits of its own
        full = [False] * len(found)
    if all_tokens > most * len(found):
        most = all_tokens
    while True:
        rest = all_tokens - most * sum(full)
        shares = _by_size(rest, [0 if f else size + 1 for f, size in zip(full, sizes)])
        over = [share > most for share in shares]
        if not any(over):
            return [most if f else share for f, share in zip(full, shares)]
        full = [f or o for f, o in zip(full, over)]


def _by_size(whole: int, sizes: Sequence[int]) -> list[int]:
    """A whole in parts that are as large as these, to the next integer."""
    shares, passed, given = [], 0, 0
    for size in sizes:
        passed += size
        up_to = whole * passed // max(1, sum(sizes))
        shares.append(up_to - given)
        given = up_to
    return shares


def _number(usage: Any, name: str) -> int | None:
    value = usage.get(name) if isinstance(usage, Mapping) else None
    return value if isinstance(value, int) and value >= 0 else None


def usage_of(answer: Mapping[str, Any], samples: Sequence[Sample]) -> tuple[int, int, int]:
    """Tokens that were read, of those the ones known already, and tokens sampled."""
    usage = answer.get("usage")
    details = usage.get("prompt_tokens_details") if isinstance(usage, Mapping) else None
    sampled = _number(usage, "completion_tokens")
    return (
        _number(usage, "prompt_tokens") or 0,
        _number(details, "cached_tokens") or 0,
        sum(sample.tokens for sample in samples) if sampled is None else sampled,
    )
