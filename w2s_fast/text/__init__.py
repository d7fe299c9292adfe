"""Text: from what a caller writes to token ids, and from token ids back to text.

Owns how a prompt is encoded for one model (plain, by a template, as a chat), how a response is
decoded behind its prompt, and what it means that two models share a vocabulary. A user's text is
data here: it is never formatted, and never becomes a special token.
"""

from w2s_fast.text.breaks import Breaks
from w2s_fast.text.chat import Chat, plain_chat
from w2s_fast.text.encoding import Written, check_unicode
from w2s_fast.text.growing import GrowingTexts, Said
from w2s_fast.text.prompt import (
    PLACEHOLDER,
    Prompt,
    PromptEncoder,
    check_template,
    check_template_text,
)
from w2s_fast.text.response import INCOMPLETE, decode_response, open_bytes
from w2s_fast.text.stops import StopStrings, TextEnd
from w2s_fast.text.translation import Translator
from w2s_fast.text.vocabulary import (
    check_same_vocabulary,
    eos_token_ids,
    ids_without_token,
    tokenizer_size,
)

__all__ = [
    "INCOMPLETE",
    "PLACEHOLDER",
    "Breaks",
    "Chat",
    "GrowingTexts",
    "Prompt",
    "PromptEncoder",
    "Said",
    "StopStrings",
    "TextEnd",
    "Translator",
    "Written",
    "check_same_vocabulary",
    "check_template",
    "check_template_text",
    "check_unicode",
    "decode_response",
    "eos_token_ids",
    "ids_without_token",
    "open_bytes",
    "plain_chat",
    "tokenizer_size",
]
