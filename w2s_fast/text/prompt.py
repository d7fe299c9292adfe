"""From what a caller writes to the token ids of one model.

Every model has its own prompt: its own template, its own BOS. A user's text is data: it is never
formatted, and never becomes a special token.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase

from w2s_fast.errors import InvalidRequest
from w2s_fast.text.chat import Chat, ChatMessage, write_chat
from w2s_fast.text.encoding import TextEncoder, Written, check_unicode
from w2s_fast.text.special_tokens import common_prefix
from w2s_fast.text.translation import Translator
from w2s_fast.text.vocabulary import ids_without_token

Prompt: TypeAlias = str | Sequence[int] | Sequence[ChatMessage] | Chat

PLACEHOLDER = "{prompt}"
_ALLOWED = "a string, a list of token ids, a list of chat messages, or a Chat"


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
        own_vocab_size: int | None = None,
    ) -> None:
        """An encoder for one model.

        Args:
            name: what errors call the model.
            template: text around every plain prompt, with ``{prompt}`` where it goes.
            vocab_size: given ids from here on are refused.
            own_vocab_size: text may hold tokens of the model's own up to here; None: no others.

        Raises:
            InvalidRequest: the template lacks ``{prompt}``, or there is no tokenizer for it.
        """
        check_template(name, template, tokenizer)
        self.name = name
        self.tokenizer = tokenizer
        self.template = template
        self.vocab_size = vocab_size
        self.bos_token_id = bos_token_id
        self._texts: TextEncoder | None = None
        self._without_token: frozenset[int] = frozenset()
        if tokenizer is not None:
            self._texts = TextEncoder(name, tokenizer, own_vocab_size or vocab_size)
            self._without_token = ids_without_token(tokenizer, vocab_size)

    def encode(self, prompt: Prompt) -> list[int]:
        """At least one token id. An empty prompt is the BOS token; no EOS is put behind one.

        Raises:
            InvalidRequest: not a prompt, an id or a token outside the vocabulary, no tokenizer for
                text or one that fails on it, no chat template for messages or one that fails on
                them, or empty for a model without BOS.
        """
        written = self._written(prompt)
        return self._or_bos(self._check_ids(prompt) if written is None else self._encode(written))

    def as_text(self, prompt: Prompt) -> Written:
        """A prompt as the text whose tokens it is.

        Raises:
            InvalidRequest: as :meth:`encode`, or it is token ids.
        """
        written = self._written(prompt)
        if written is None:
            raise InvalidRequest(f"token ids are no prompt for {self.name}, which reads text")
        return written

    def encode_with_response(
        self, prompt: Prompt, response: str | Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """Tokens of a prompt and of a given response to it, at least one of each.

        A text is tokenised behind the prompt, and the response begins after the longest common
        prefix of the tokens of the prompt and of both together. Behind token ids, whose text is
        not known, it is tokenised as a text that goes on.

        Raises:
            InvalidRequest: as :meth:`encode`, or the response is empty.
        """
        written = self._written(prompt)
        before = self._check_ids(prompt) if written is None else self._encode(written)
        if not isinstance(response, str) or written is None:
            after = self.encode_response(response)
        else:
            check_unicode(response, "a response")
            both = self._encode(written.followed_by(response))
            common = common_prefix(before, both)
            before, after = before[:common], both[common:]
        if not after:
            raise InvalidRequest("a response is empty; allowed: at least one token")
        return self._or_bos(before), after

    def encode_response(self, response: str | Sequence[int]) -> list[int]:
        """Tokens of a given response by itself: it goes on behind tokens that are not known.

        Raises:
            InvalidRequest: as :meth:`encode`.
        """
        if not isinstance(response, str):
            return self._check_ids(response, "a response", "a string, or a list of token ids")
        check_unicode(response, "a response")
        return self._need_texts().encode_behind(response)

    def translator(self) -> Translator:
        """For responses behind this model's prompts. InvalidRequest without a tokenizer."""
        return Translator(self._need_texts(), self.vocab_size, self.bos_token_id)

    def _or_bos(self, ids: list[int]) -> list[int]:
        if ids:
            return ids
        if self.bos_token_id is None:
            raise InvalidRequest(
                f"the prompt is empty for {self.name}, which has no BOS token to start from; "
                "give at least one token"
            )
        return [self.bos_token_id]

    def _written(self, prompt: Prompt) -> Written | None:
        """A prompt as text; None if it is token ids."""
        if isinstance(prompt, str):
            return self._write_text(prompt)
        if isinstance(prompt, Chat):
            return write_chat(self._need_texts(), prompt)
        prompt = _listed(prompt)
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
            kind = type(prompt).__name__
            raise InvalidRequest(f"a prompt is {kind}; allowed: {_ALLOWED}{_hint(prompt)}")
        if prompt and all(isinstance(item, Mapping) for item in prompt):
            messages: Sequence[ChatMessage] = prompt  # type: ignore[assignment]
            return write_chat(self._need_texts(), Chat(messages))
        return None

    def _check_ids(self, given: Any, what: str = "a prompt", allowed: str = _ALLOWED) -> list[int]:
        given = _listed(given)
        if not isinstance(given, Sequence) or isinstance(given, bytes):
            raise InvalidRequest(f"{what} is {type(given).__name__}; allowed: {allowed}")
        ids = []
        for item in given:
            if isinstance(item, bool) or not hasattr(item, "__index__"):
                raise InvalidRequest(f"{what} holds {reprlib.repr(item)}; allowed: {allowed}")
            token = item.__index__()
            if not 0 <= token < self.vocab_size:
                raise InvalidRequest(
                    f"token id {token} is outside the vocabulary; allowed: 0 to "
                    f"{self.vocab_size - 1}"
                )
            if token in self._without_token:
                raise InvalidRequest(
                    f"token id {token} is no token: the vocabulary of {self.name} leaves it out"
                )
            ids.append(token)
        return ids

    def _write_text(self, text: str) -> Written:
        texts = self._need_texts()
        check_unicode(text, "a prompt")
        if self.template is None:
            return Written(text, plain=True)
        before, after = self.template.split(PLACEHOLDER)
        # Special tokens are those that stand in the template as a whole.
        behind = len(before) + len(text)
        special = texts.specials.find(
            before + text + after, lambda span: span[1] <= len(before) or span[0] >= behind
        )
        return Written(before + text + after, special)

    def _encode(self, written: Written) -> list[int]:
        return self._need_texts().encode(written)

    def _need_texts(self) -> TextEncoder:
        if self._texts is None:
            raise InvalidRequest(f"{self.name} has no tokenizer; give its prompt as token ids")
        return self._texts


def _listed(given: Any) -> Any:
    """Token ids in an array or a tensor as a list; anything else as it is."""
    return given.tolist() if getattr(given, "ndim", None) == 1 else given


def _hint(prompt: Any) -> str:
    """How what is no prompt becomes one."""
    if getattr(prompt, "ndim", 0) > 1:
        return "; of a tensor with several rows each is a prompt, without its padding"
    if isinstance(prompt, Mapping) and "input_ids" in prompt:
        return "; of an encoding give input_ids, as a tokenizer makes them without padding"
    if isinstance(prompt, Mapping) and "role" in prompt:
        return "; a message goes into a list, as chats have several"
    return ""


def check_template(name: str, template: Any, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """InvalidRequest: it lacks ``{prompt}``, or there is no tokenizer for it; names the model."""
    if template is None:
        return
    check_template_text(name, template)
    if tokenizer is None:
        raise InvalidRequest(f"{name} has no tokenizer, so it can have no prompt_template")


def check_template_text(name: str, template: Any) -> None:
    """InvalidRequest: it lacks ``{prompt}``; names the model."""
    if not isinstance(template, str) or template.count(PLACEHOLDER) != 1:
        raise InvalidRequest(
            f"prompt_template of {name} is {template!r}; it must hold {PLACEHOLDER} exactly once"
        )
    check_unicode(template, f"prompt_template of {name}")
