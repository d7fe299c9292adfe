"""How the text of a prompt is put to the models: as it is, or as a message of a chat."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from w2s_fast.cli.console import note


@dataclass(frozen=True)
class Asking:
    """``system``: a system message before the user's; None: there is none. ``templated``: a prompt
    template stands around plain texts."""

    chat: bool = False
    system: str | None = None
    templated: bool = False

    def prompt(self, text: str) -> str | list[dict[str, Any]]:
        """As an engine takes it."""
        if not self.chat:
            return text
        messages: list[dict[str, Any]] = [{"role": "user", "content": text}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        return messages


PLAINLY = Asking()


class TemplateNote:
    """Says once that a model with a chat template is given plain text, which is seldom meant."""

    def __init__(self, asking: Asking, tokenizer: Any, say: Callable[[str], None] = note) -> None:
        """``tokenizer``: the base's; None: it has none, or it is not known here."""
        has_template = getattr(tokenizer, "chat_template", None) is not None
        self._to_say = has_template and not asking.templated
        self._say = say

    def see(self, prompt: object) -> None:
        if self._to_say and isinstance(prompt, str):
            self._to_say = False
            self._say(
                "the model has a chat template, and goes on with this text without it; --chat "
                "puts the text as a user's message"
            )
