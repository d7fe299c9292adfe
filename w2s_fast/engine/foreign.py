"""Foreign guides: how the base's responses are read by guides of other vocabularies."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from w2s_fast._pages import Hold
from w2s_fast.engine.named import REMOTE
from w2s_fast.errors import InvalidRequest
from w2s_fast.models import PagedModel
from w2s_fast.remote import Utf8Texts
from w2s_fast.search import ForeignGuide, ForeignGuides, ForeignPrompt, PagedGuide
from w2s_fast.text import (
    GrowingTexts,
    Prompt,
    PromptEncoder,
    Said,
    Translator,
    decode_response,
    eos_token_ids,
)


class Translation:
    """A :class:`Translator`, for one thread at a time: fast tokenizers keep the options of a call
    as their own state."""

    def __init__(self, encoder: PromptEncoder) -> None:
        self.encoder = encoder
        self._translator: Translator = encoder.translator()
        self._one_at_a_time = threading.Lock()

    def begin(self, written: Any) -> Any:
        with Hold(self._one_at_a_time):
            return self._translator.begin(written)

    def extend(self, texts: Sequence[Any], responses: Sequence[str]) -> Sequence[Any]:
        with Hold(self._one_at_a_time):
            return self._translator.extend(texts, responses)


def foreign_guides(
    guides: Sequence[PagedGuide],
    differences: Sequence[str | None],
    encoder_of: Mapping[PagedModel, PromptEncoder],
    tokenizer: PreTrainedTokenizerBase | None,
) -> ForeignGuides | None:
    """Those that have a vocabulary of their own; None: all share the base's.

    Args:
        differences: how each guide's vocabulary differs from the base's. tokenizer: the base's.
    """
    found = [
        ForeignGuide(guide, _eos_of(guide, encoder_of), why)
        for guide, why in zip(guides, differences)
        if why is not None
    ]
    if not found or tokenizer is None:
        return None
    silent = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    translations = _translations(found, encoder_of)
    return ForeignGuides(found, translations, GrowingTexts(tokenizer), frozenset(silent))


def guides_of_texts(
    guides: Sequence[PagedGuide], encoder_of: Mapping[PagedModel, PromptEncoder]
) -> ForeignGuides | None:
    """Guides of a base of which only texts are known; None: there are none."""
    found = [ForeignGuide(guide, _eos_of(guide, encoder_of), REMOTE) for guide in guides]
    if not found:
        return None
    return ForeignGuides(found, _translations(found, encoder_of), Utf8Texts(), frozenset())


def _translations(
    found: Sequence[ForeignGuide], encoder_of: Mapping[PagedModel, PromptEncoder]
) -> dict[PagedModel, Translation]:
    translations: dict[PagedModel, Translation] = {}
    for model in (model for own in found for model in own.guide.models):
        if model not in translations:
            encoder = encoder_of[model]
            alike = (own for own in translations.values() if _read_alike(own.encoder, encoder))
            translations[model] = next(alike, None) or Translation(encoder)
    return translations


def foreign_prompt(
    foreign: ForeignGuides,
    prompt: Prompt,
    encoder_of: Mapping[PagedModel, PromptEncoder],
    tokenizer: PreTrainedTokenizerBase | None,
) -> ForeignPrompt:
    """A prompt as foreign guides have it; without the base's ``tokenizer`` it is no token ids.

    Raises:
        InvalidRequest: a model cannot have it; says which, and why.
    """
    known: list[tuple[Any, Any, Any]] = []
    for model, translation in foreign.translators.items():
        encoder = encoder_of[model]
        own = prompt if tokenizer is None else in_words(prompt, tokenizer, encoder.name)
        if isinstance(own, str):
            own = str(own)  # nothing more than that: other ranks may have to read it
        written = encoder.as_text(own)
        same = (text for other, w, text in known if other is translation and w == written)
        assert isinstance(translation, Translation)
        text = next(same, None) or translation.begin(written)
        known.append((translation, written, text))
    return ForeignPrompt(Said(), [text for *_, text in known])


def in_words(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, name: str) -> Prompt:
    """A prompt that is no list of the base's token ids.

    Raises:
        InvalidRequest: there are special tokens among those; ``name`` is the model's.
    """
    if isinstance(prompt, str) or not isinstance(prompt, Sequence):
        return prompt
    if not all(isinstance(item, int) for item in prompt):
        return prompt
    ids = [int(item) for item in prompt if isinstance(item, int)]
    if ids[:1] == [tokenizer.bos_token_id]:  # each model has its own
        ids = ids[1:]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    if not special.isdisjoint(ids):
        raise InvalidRequest(
            f"a prompt of token ids holds special tokens, which {name} has not: its vocabulary is "
            "another; give the prompt as text, or as messages"
        )
    return decode_response(tokenizer, [], ids)


def _read_alike(a: PromptEncoder, b: PromptEncoder) -> bool:
    """Whether two models' tokenizers give the same tokens for all texts."""
    if a.vocab_size != b.vocab_size or a.bos_token_id != b.bos_token_id:
        return False
    if a.tokenizer is b.tokenizer:
        return True
    backends = [getattr(own.tokenizer, "backend_tokenizer", None) for own in (a, b)]
    return None not in backends and len({own.to_str() for own in backends if own}) == 1


def _eos_of(guide: PagedGuide, encoder_of: Mapping[PagedModel, PromptEncoder]) -> int | None:
    """What ends a text for a guide: the tokenizer's own EOS, or the first of its model's."""
    model = guide.models[0]
    tokenizer = encoder_of[model].tokenizer
    own = getattr(tokenizer, "eos_token_id", None)
    if own is None:
        own = min(eos_token_ids(model.model, tokenizer), default=None)
    return own if own is not None and own < guide.vocab_size else None
