"""``/tokenize``, ``/detokenize`` and ``/tokenizer_info``: the base's tokens."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from w2s_fast.serve.chat import Message
from w2s_fast.serve.refusals import Refusal
from w2s_fast.serve.service import Service
from w2s_fast.text import Chat, Prompt


class TokenizeBody(BaseModel):
    """A text as it is (``prompt``), or as a chat's prompt (``messages``)."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    tokens: list[int]


def tokenize(service: Service, body: TokenizeBody) -> dict[str, Any]:
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise Refusal(400, "there is no text, or more than one; allowed: prompt, or messages")
    tokenizer, engine = service.tokenizer, service.engine.engine
    prompt: Prompt
    if body.messages is not None:
        messages = [message.model_dump(exclude_unset=True) for message in body.messages]
        prompt = Chat(messages, None, body.chat_template_kwargs)
        ids = engine.encode(prompt)
    elif body.add_special_tokens:
        ids = engine.encode(body.prompt or "") if body.prompt else list(tokenizer("")["input_ids"])
    else:
        ids = engine.encode_behind(body.prompt or "")
    answer: dict[str, Any] = {
        "count": len(ids),
        "max_model_len": engine.max_tokens,
        "tokens": ids,
        "token_strs": None,
    }
    if body.return_token_strs:
        answer["token_strs"] = tokenizer.convert_ids_to_tokens(ids)
    return answer


def detokenize(service: Service, body: DetokenizeBody) -> dict[str, Any]:
    service.check_model(body.model)
    size = service.engine.engine.vocab_size
    for token in body.tokens:
        if not 0 <= token < size:
            raise Refusal(400, f"tokens holds {token}; allowed: 0 to {size - 1}", param="tokens")
    return {"prompt": service.tokenizer.decode(body.tokens, clean_up_tokenization_spaces=False)}


def tokenizer_info(service: Service) -> dict[str, Any]:
    """What clients that tokenise by themselves ask for."""
    tokenizer = service.tokenizer
    return {
        "tokenizer_class": type(tokenizer).__name__,
        "vocab_size": service.engine.engine.vocab_size,
        "model_max_length": service.engine.engine.max_tokens,
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token,
        "unk_token": tokenizer.unk_token,
        "chat_template": tokenizer.chat_template,
    }
