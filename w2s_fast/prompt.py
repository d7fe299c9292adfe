"""From what a caller writes to the token ids of one model, and from ids back to text.

Every model has its own prompt: its own template, its own BOS. A user's text is data: it is never
formatted, and never becomes a special token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase

from w2s_fast.errors import InvalidRequest

ChatMessage: TypeAlias = Mapping[str, str]
Prompt: TypeAlias = str | Sequence[int] | Sequence[ChatMessage]

PLACEHOLDER = "{prompt}"
_ALLOWED = "a string, a list of token ids, or a list of chat messages"
_CONTEXT_TOKENS = 8  # enough for a tokenizer to see that a response does not begin a text


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
            _check_unicode(response)
            alone = self._encode_text(prompt)
            both = _plain(self._need_tokenizer(), prompt + response, add_special_tokens=True)
            common = _common_prefix(alone, both)
            before, after = self._or_bos(alone[:common]), both[common:]
        else:
            before = self.encode(prompt)
            if isinstance(response, str):  # behind a template or given ids it stands by itself
                after = _plain(self._need_tokenizer(), response, add_special_tokens=False)
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
            return self._encode_chat(prompt)  # type: ignore[arg-type]
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
        _check_unicode(text)
        if self.template is None:
            return _plain(tokenizer, text, add_special_tokens=True)
        before, after = self.template.split(PLACEHOLDER)
        return _between(tokenizer, [before, after], [text])

    def _encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        tokenizer = self._need_tokenizer()
        for message in messages:
            if not isinstance(message.get("role"), str) or not isinstance(
                message.get("content"), str
            ):
                raise InvalidRequest(
                    f"a chat message is {dict(message)!r}; allowed: a mapping with the strings "
                    "'role' and 'content'"
                )
            _check_unicode(message["content"])
        if tokenizer.chat_template is None:
            raise InvalidRequest(f"{self.name} has no chat template; give its prompt as a string")
        # Contents are rendered as marks no text holds, so that what the template wrote and what
        # a user wrote can be told apart.
        marks = [f"\ue000{i}\ue001" for i in range(len(messages))]
        marked = [{**m, "content": mark} for m, mark in zip(messages, marks)]
        try:
            text = tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template may raise anything
            raise InvalidRequest(f"the chat template of {self.name} failed: {error}") from error
        pieces, contents, rest = [], [], str(text)
        for mark, message in zip(marks, messages):
            if rest.count(mark) != 1:
                raise InvalidRequest(
                    f"the chat template of {self.name} does not take these messages in order"
                )
            before, rest = rest.split(mark)
            pieces.append(before)
            contents.append(message["content"])
        return _between(tokenizer, [*pieces, rest], contents)

    def _need_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise InvalidRequest(f"{self.name} has no tokenizer; give its prompt as token ids")
        return self.tokenizer


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


def _plain(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool) -> list[int]:
    """Text of a user: what looks like a special token is encoded as the characters it is."""
    ids: list[int] = tokenizer(
        text, add_special_tokens=add_special_tokens, split_special_tokens=True
    )["input_ids"]
    return ids


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"a text is not valid Unicode: {error}") from error


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens agree."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _between(
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
        ids += _plain(tokenizer, text, add_special_tokens=False) if text else []
    return ids
