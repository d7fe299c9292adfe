"""From what a caller writes to the token ids of one model.

Every model has its own prompt: its own template, its own BOS. A user's text is data: it is never
formatted, and never becomes a special token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase

from w2s_fast.errors import InvalidRequest
from w2s_fast.text.chat import ChatMessage, encode_chat
from w2s_fast.text.encoding import check_unicode, encode_between, encode_plain

Prompt: TypeAlias = str | Sequence[int] | Sequence[ChatMessage]

PLACEHOLDER = "{prompt}"
_ALLOWED = "a string, a list of token ids, or a list of chat messages"


class PromptEncoder:
    """Encodes prompts for one model."""

    def __init__(
        self,
        name: str,
        tokenizer: PreTrainedTokenizerBase | None,
        template: str | None = None,
        *,
        vocab_size: int,
        bos_token_id: int | None,
    ) -> None:
        """``template``: text around every plain prompt, with ``{prompt}`` where it goes.

        Raises:
            InvalidRequest: the template lacks ``{prompt}``, or there is no tokenizer for it.
        """
        if template is not None and template.count(PLACEHOLDER) != 1:
            raise InvalidRequest(
                f"prompt_template of {name} is {template!r}; "
                f"it must hold {PLACEHOLDER} exactly once"
            )
        if template is not None and tokenizer is None:
            raise InvalidRequest(f"{name} has no tokenizer, so it can have no prompt_template")
        self.name = name
        self.tokenizer = tokenizer
        self.template = template
        self.vocab_size = vocab_size
        self.bos_token_id = bos_token_id

    def encode(self, prompt: Prompt) -> list[int]:
        """At least one token id. An empty prompt is the BOS token.

        Raises:
            InvalidRequest: not a prompt, an id outside the vocabulary, no tokenizer for text, no
                chat template for messages, or empty for a model without BOS.
        """
        return self._or_bos(self._ids(prompt))

    def encode_with_response(
        self, prompt: Prompt, response: str | Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """Tokens of a prompt and of a given response to it, at least one of each.

        A text is tokenised behind the prompt, and the response begins after the longest common
        prefix of the tokens of the prompt and of both together.

        Raises:
            InvalidRequest: as :meth:`encode`, or the response is empty.
        """
        if isinstance(response, str) and isinstance(prompt, str) and self.template is None:
            check_unicode(response)
            alone = self._encode_text(prompt)
            both = encode_plain(self._need_tokenizer(), prompt + response, add_special_tokens=True)
            common = _common_prefix(alone, both)
            before, after = self._or_bos(alone[:common]), both[common:]
        else:
            before = self.encode(prompt)
            if isinstance(response, str):  # behind a template or given ids it stands by itself
                after = encode_plain(self._need_tokenizer(), response, add_special_tokens=False)
            else:
                after = self._check_ids(response)
        if not after:
            raise InvalidRequest("a response is empty; allowed: at least one token")
        return before, after

    def _or_bos(self, ids: list[int]) -> list[int]:
        if ids:
            return ids
        if self.bos_token_id is None:
            raise InvalidRequest(
                f"the prompt is empty for {self.name}, which has no BOS token to start from; "
                "give at least one token"
            )
        return [self.bos_token_id]

    def _ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self._encode_text(prompt)
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
            raise InvalidRequest(f"a prompt is {type(prompt).__name__}; allowed: {_ALLOWED}")
        if prompt and all(isinstance(item, Mapping) for item in prompt):
            messages: Sequence[ChatMessage] = prompt  # type: ignore[assignment]
            return encode_chat(self._need_tokenizer(), messages, self.name)
        return self._check_ids(prompt)

    def _check_ids(self, prompt: Sequence[Any]) -> list[int]:
        ids = []
        for item in prompt:
            if isinstance(item, bool) or not hasattr(item, "__index__"):
                raise InvalidRequest(f"a prompt holds {item!r}; allowed: {_ALLOWED}")
            token = item.__index__()
            if not 0 <= token < self.vocab_size:
                raise InvalidRequest(
                    f"token id {token} is outside the vocabulary; allowed: 0 to "
                    f"{self.vocab_size - 1}"
                )
            ids.append(token)
        return ids

    def _encode_text(self, text: str) -> list[int]:
        tokenizer = self._need_tokenizer()
        check_unicode(text)
        if self.template is None:
            return encode_plain(tokenizer, text, add_special_tokens=True)
        before, after = self.template.split(PLACEHOLDER)
        return encode_between(tokenizer, [before, after], [text])

    def _need_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise InvalidRequest(f"{self.name} has no tokenizer; give its prompt as token ids")
        return self.tokenizer


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens agree."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
