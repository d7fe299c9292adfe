"""ServedModels: from what a caller names to models that run, checked against each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from w2s_fast.engine.encoders import make_encoder, templates_of, tokenizers_of
from w2s_fast.errors import MismatchedVocabulary
from w2s_fast.models import (
    ModelSource,
    PagedModel,
    activation_bytes,
    activations_of,
    free_bytes,
    kv_tokens_that_fit,
    load_model,
    load_tokenizer,
    usual_pass_tokens,
)
from w2s_fast.search import Guide, PagedGuide
from w2s_fast.text import (
    PromptEncoder,
    check_same_vocabulary,
    eos_token_ids,
    ids_without_token,
    tokenizer_size,
)

_MAX_SLOTS = 4096


@dataclass(frozen=True)
class ServedModels:
    """A base and its guides, each over pages of its own, and how prompts become their tokens.

    Attributes:
        tokenizer: the base's; None: prompts are token ids.
        vocab_size: of the vocabulary that all models share; ids from here on are padding.
        eos_token_ids: what ends a response.
        encoder: for the base's prompts.
        guide_encoders: for those of each guide, of its tuned and of its untuned model.
    """

    base: PagedModel
    guides: list[PagedGuide]
    tokenizer: PreTrainedTokenizerBase | None
    vocab_size: int
    eos_token_ids: frozenset[int]
    encoder: PromptEncoder
    guide_encoders: list[tuple[PromptEncoder, PromptEncoder]]

    @property
    def of_guides(self) -> list[PagedModel]:
        """The models of all guides, tuned and untuned."""
        return [model for guide in self.guides for model in guide.models]


def serve_models(
    base: ModelSource,
    guides: Sequence[Guide],
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    device: torch.device,
    dtype: str | torch.dtype,
    kv_cache_tokens: int | None,
    page_size: int,
    attention: str,
    max_rows: int,
    max_pass_tokens: int | None,
    prefix_cache: bool,
    prompt_template: str | None,
) -> ServedModels:
    """Load the models, and give each its pages; see :class:`w2s_fast.Engine` for the arguments.

    A model that is named twice is loaded once.

    Raises:
        UnsupportedModel: a model cannot be loaded or served.
        MismatchedVocabulary: a guide does not share the base's vocabulary.
        InvalidRequest: there is no room for any tokens, or a template that cannot be used.
    """
    templates = templates_of(guides)
    loaded: dict[Any, PreTrainedModel] = {}

    def load(source: ModelSource) -> PreTrainedModel:
        key = id(source) if isinstance(source, PreTrainedModel) else str(source)
        if key not in loaded:
            loaded[key] = load_model(source, device, dtype)
        return loaded[key]

    base_model = load(base)
    pairs = [(load(guide.tuned), load(guide.untuned)) for guide in guides]
    models = [base_model, *(model for pair in pairs for model in pair)]
    max_pass_tokens, activations = _passes(models, max_pass_tokens, max_rows)
    useful = _useful_tokens(base_model, max_rows)
    tokens = kv_cache_tokens or kv_tokens_that_fit(models, useful, activations)

    def page(model: PreTrainedModel, role: str, source: ModelSource) -> PagedModel:
        return PagedModel(
            model,
            role if isinstance(source, PreTrainedModel) else f"{role} ({source})",
            kv_cache_tokens=tokens,
            page_size=page_size,
            max_slots=_MAX_SLOTS,
            prefix_cache=prefix_cache,
            attention=attention,
            max_pass_tokens=max_pass_tokens,
        )

    if tokenizer is None:
        tokenizer = load_tokenizer(base)
    paged_base = page(base_model, "base", base)
    paged = []
    for g, (guide, (tuned, untuned)) in enumerate(zip(guides, pairs)):
        number = f" {g}" if len(guides) > 1 else ""
        paged.append(
            (
                page(tuned, f"tuned{number}", guide.tuned),
                page(untuned, f"untuned{number}", guide.untuned),
            )
        )
    of_guides = [model for pair in paged for model in pair]
    tokenizers = tokenizers_of(guides, tokenizer)
    vocab_size = _shared_vocabulary(paged_base, tokenizer, of_guides, tokenizers)
    if tokenizer is not None and (gaps := ids_without_token(tokenizer, vocab_size)):
        for model in (paged_base, *of_guides):
            model.forbid(gaps)
    encoders = [
        make_encoder(model, own, template, vocab_size)
        for model, own, template in zip(of_guides, tokenizers, templates)
    ]

    return ServedModels(
        base=paged_base,
        guides=[
            PagedGuide(tuned, untuned, guide.weight, vocab_size)
            for guide, (tuned, untuned) in zip(guides, paged)
        ],
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        eos_token_ids=frozenset(eos_token_ids(base_model, tokenizer)),
        encoder=make_encoder(paged_base, tokenizer, prompt_template, vocab_size),
        guide_encoders=list(zip(encoders[::2], encoders[1::2])),
    )


def _shared_vocabulary(
    base: PagedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    models: Sequence[PagedModel],
    tokenizers: Sequence[PreTrainedTokenizerBase | None],
) -> int:
    """The size of the vocabulary that all models share. MismatchedVocabulary if they do not.

    ``models``: those of the guides, and ``tokenizers``: theirs.
    """
    size = base.vocab_size
    if tokenizer is not None:
        size = min(size, tokenizer_size(tokenizer))
        for model, own in zip(models, tokenizers):
            if own is not None and own is not tokenizer:
                check_same_vocabulary(tokenizer, own, model.name)
            if model.vocab_size < size:
                raise MismatchedVocabulary(
                    f"{model.name} has logits for {model.vocab_size} tokens, but the base's "
                    f"vocabulary has {size}"
                )
    return min([size, *(model.vocab_size for model in models)])


def _passes(
    models: Sequence[PreTrainedModel], max_pass_tokens: int | None, max_rows: int
) -> tuple[int, int]:
    """Tokens of a pass, and bytes that passes and padded heads need: measured on CUDA, where they
    count.

    ``models``: the base, and each guide's. On a CPU pages leave far more than that.
    """
    device = models[0].device
    if device.type != "cuda":
        return max_pass_tokens or usual_pass_tokens(device.type, 0, 0), 0
    found = [activations_of(model) for model in models]
    torch.cuda.empty_cache()  # the measurement's
    if max_pass_tokens is None:
        one = activation_bytes(found, 1, 1)
        max_pass_tokens = usual_pass_tokens(device.type, free_bytes(device), one)
    heads = sum(one.head for one in found)
    return max_pass_tokens, activation_bytes(found, max_pass_tokens, max_rows) + heads


def _useful_tokens(base: PreTrainedModel, max_rows: int) -> int:
    longest = getattr(base.config.get_text_config(), "max_position_embeddings", None) or 32768
    return int(max_rows * longest)
