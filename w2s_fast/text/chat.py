"""Chat messages, written out by a tokenizer's own template."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from transformers.utils.chat_template_utils import get_json_schema

from w2s_fast.errors import InvalidRequest
from w2s_fast.text.authorship import written_by_template
from w2s_fast.text.encoding import TextEncoder, Written, brief, check_unicode

ChatMessage: TypeAlias = Mapping[str, Any]

# What belongs to apply_chat_template itself, and is not the caller's to set.
_RESERVED = frozenset(
    (
        *("conversation", "messages", "tools", "chat_template", "add_generation_prompt"),
        *("continue_final_message", "sanitize_control_tokens", "tokenize", "tokenizer_kwargs"),
        *("padding", "truncation", "max_length", "return_tensors", "return_dict"),
        "return_assistant_tokens_mask",
    )
)


@dataclass(frozen=True)
class Chat:
    """Chat messages as a prompt, with what else the chat template takes.

    Attributes:
        messages: mappings with a string ``"role"``, and mostly ``"content"``: a string, or a list
            of parts such as ``{"type": "text", "text": ...}``. The template sees them as they are.
        tools: JSON schemas (or documented functions) of what the model may call.
        chat_template_kwargs: further variables of the template, such as ``enable_thinking``.
        continue_final_message: the response goes on with the last message, instead of answering it.
    """

    messages: Sequence[ChatMessage]
    tools: Sequence[Any] | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    continue_final_message: bool = False


def write_chat(encoder: TextEncoder, chat: Chat) -> Written:
    """A chat as the template of ``encoder.tokenizer`` writes it, up to where a response begins.

    Its tokens are those of ``apply_chat_template`` on the same messages. Only what a string of the
    request spells is text, also where it spells a special token: in any message, tool or variable,
    in keys or values, in any case of letters, and whatever the template does with it (trims, cuts,
    moves or changes it). Where strings of the request and of the template together make a special
    token, it is one if the request gave no sign at its beginning or end, such as ``<``: so a
    template may write ``<|`` role ``|>``. That is seen as long as the template does not look for
    that sign in the strings; where it does (it cuts at ``</think>``, say), tokens that neither
    side spells alone are read as ``apply_chat_template`` reads them.

    Raises:
        InvalidRequest: not a chat, no chat template, one that fails on it, or one of which it
            cannot be told which special tokens are its own.
    """
    given = plain_chat(chat)
    tokenizer, name = encoder.tokenizer, encoder.name
    if getattr(tokenizer, "chat_template", None) is None:
        raise InvalidRequest(f"{name} has no chat template; give its prompt as a string")

    def write(given: dict[str, Any]) -> str:
        options = {**given["options"], "tools": given["tools"], "tokenize": False}
        options["add_generation_prompt"] = not chat.continue_final_message
        options["continue_final_message"] = chat.continue_final_message
        try:
            # A copy: no template changes what the caller, or another model, is still to use.
            return str(tokenizer.apply_chat_template(_copy(given["messages"], ""), **options))
        except Exception as error:  # a template may raise anything
            raise InvalidRequest(f"the chat template of {name} failed: {brief(error)}") from error

    text = write(given)
    check_unicode(text, f"what the chat template of {name} writes")
    return Written(text, written_by_template(encoder.specials, given, text, write))


def plain_chat(chat: Chat) -> dict[str, Any]:
    """All that a template is given, checked and copied: plain values and nothing else.

    Returns:
        ``messages``, ``tools`` (or None) and ``options``, the template's further variables.

    Raises:
        InvalidRequest: not a chat.
    """
    if not isinstance(chat.continue_final_message, bool):
        raise InvalidRequest(
            f"continue_final_message is {chat.continue_final_message!r}; allowed: a bool"
        )
    tools, options = chat.tools, chat.chat_template_kwargs
    if tools is not None and (isinstance(tools, (str, bytes)) or not isinstance(tools, Sequence)):
        raise InvalidRequest(f"tools is {type(tools).__name__}; allowed: a list of JSON schemas")
    if options is not None and not isinstance(options, Mapping):
        raise InvalidRequest(f"chat_template_kwargs is {type(options).__name__}; allowed: a dict")
    for key in options or ():
        if not isinstance(key, str) or key in _RESERVED:
            raise InvalidRequest(
                f"chat_template_kwargs holds {key!r}; allowed: strings, none of "
                f"{', '.join(sorted(_RESERVED))}"
            )
    try:
        return {
            "messages": _messages(chat.messages),
            "tools": None if tools is None else [_tool(tool, i) for i, tool in enumerate(tools)],
            "options": _copy(options or {}, "chat_template_kwargs"),
        }
    except RecursionError:
        raise InvalidRequest("a chat is nested too deeply") from None


def _messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise InvalidRequest("messages must be a list of at least one chat message")
    copies = []
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        content = message.get("content") if isinstance(message, Mapping) else None
        parts = isinstance(content, (list, tuple)) and all(isinstance(p, Mapping) for p in content)
        # One that calls tools, say, may have no content.
        missing = content is None and isinstance(message, Mapping) and len(message) > 1
        if not isinstance(role, str) or not (isinstance(content, str) or parts or missing):
            raise InvalidRequest(
                f"a chat message is {reprlib.repr(message)}; allowed: a mapping with the string "
                "'role', and 'content': a string or a list of parts"
            )
        copies.append(_copy(message, f"messages[{i}]"))
    return copies


def _tool(tool: Any, number: int) -> Any:
    where = f"tools[{number}]"
    if callable(tool):
        try:
            tool = get_json_schema(tool)
        except Exception as error:  # of functions that are not documented as it asks for
            raise InvalidRequest(f"{where} cannot be described: {brief(error)}") from error
    if not isinstance(tool, Mapping):
        raise InvalidRequest(f"{where} is {type(tool).__name__}; allowed: a JSON schema")
    return _copy(tool, where)


def _copy(value: Any, where: str) -> Any:
    """Plain values, copied; InvalidRequest says where there is anything else."""
    if isinstance(value, str):
        check_unicode(value, where)
        return str.__str__(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (int, float)):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, Mapping):
        return {
            _copy(k, f"a key in {where}"): _copy(v, f"{where}[{k!r:.40}]") for k, v in value.items()
        }
    if isinstance(value, (list, tuple)):
        items = [_copy(item, f"{where}[{i}]") for i, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    raise InvalidRequest(
        f"{where} is {type(value).__name__}; allowed: strings, numbers, None, lists and dicts"
    )
