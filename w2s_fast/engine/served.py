"""ServedModels: from what a caller names to models that run, checked against each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from w2s_fast.engine.encoders import make_encoder, templates_of, tokenizer_of
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
    """A base and its guides, each model over pages of its own, and how prompts become their tokens.

    Attributes:
        models: all of them, each once, the base first.
        encoders: for the prompts of each.
        tokenizer: the base's; None: prompts are token ids.
        vocab_size: of the vocabulary that all models share; ids from here on are padding.
        eos_token_ids: what ends a response.
    """

    models: list[PagedModel]
    encoders: list[PromptEncoder]
    guides: list[PagedGuide]
    tokenizer: PreTrainedTokenizerBase | None
    vocab_size: int
    eos_token_ids: frozenset[int]

    @property
    def base(self) -> PagedModel:
        return self.models[0]

    @property
    def of_guides(self) -> list[PagedModel]:
        """Those that only guides have."""
        return self.models[1:]

    def encoders_of(self, guide: int) -> list[PromptEncoder]:
        """For the prompts of a guide's models."""
        return [self.encoders[self.models.index(model)] for model in self.guides[guide].models]


class _Role(NamedTuple):
    """What a model is to do: two roles with the same model, tokenizer and template are one.

    Attributes:
        name: what errors call it.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    template: str | None

    @property
    def key(self) -> tuple[int, int, str | None]:
        return id(self.model), id(self.tokenizer), self.template


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

    A model that is named twice is loaded once; where its prompts are the same, it has pages once.

    Raises:
        UnsupportedModel: a model cannot be loaded or served.
        MismatchedVocabulary: a guide does not share the base's vocabulary.
        InvalidRequest: there is no room for any tokens, or a template that cannot be used.
    """
    templates = templates_of(guides)
    # The base first: a path that is none is an error of its model, and not of its tokenizer.
    loaded = {_key(base): load_model(base, device, dtype)}
    if tokenizer is None:
        tokenizer = load_tokenizer(base)
    tokenizers = {_key(base): tokenizer}

    def role(name: str, source: ModelSource, template: str | None) -> _Role:
        key = _key(source)
        if key not in loaded:
            loaded[key] = load_model(source, device, dtype)
        if key not in tokenizers:
            tokenizers[key] = tokenizer_of(source, tokenizer)
        if not isinstance(source, PreTrainedModel):
            name = f"{name} ({source})"
        return _Role(name, loaded[key], tokenizers[key], template)

    roles = [role("base", base, prompt_template)]
    of_guides: list[list[_Role]] = []
    for g, (guide, (of_tuned, of_untuned)) in enumerate(zip(guides, templates)):
        number = f" {g}" if len(guides) > 1 else ""
        own = [role(f"tuned{number}", guide.tuned, of_tuned)]
        if guide.untuned is not None:
            own.append(role(f"untuned{number}", guide.untuned, of_untuned))
        of_guides.append(own)
        roles += own
    distinct = {role.key: role for role in reversed(roles)}  # the first of each
    roles = [role for role in roles if distinct[role.key] is role]

    weights = [role.model for role in roles]
    max_pass_tokens, activations = _passes(weights, max_pass_tokens, max_rows)
    useful = _useful_tokens(roles[0].model, max_rows)
    tokens = kv_cache_tokens or kv_tokens_that_fit(weights, useful, activations)
    models = [
        PagedModel(
            role.model,
            role.name,
            kv_cache_tokens=tokens,
            page_size=page_size,
            max_slots=_MAX_SLOTS,
            prefix_cache=prefix_cache,
            attention=attention,
            max_pass_tokens=max_pass_tokens,
        )
        for role in roles
    ]
    paged = dict(zip((role.key for role in roles), models))
    vocab_size = _shared_vocabulary(models, [role.tokenizer for role in roles])
    if tokenizer is not None and (gaps := ids_without_token(tokenizer, vocab_size)):
        for model in models:
            model.forbid(gaps)
    pairs = [[paged[role.key] for role in own] for own in of_guides]

    return ServedModels(
        models=models,
        encoders=[
            make_encoder(model, role.tokenizer, role.template, vocab_size)
            for model, role in zip(models, roles)
        ],
        guides=[
            PagedGuide(own[0], own[1] if len(own) > 1 else None, guide.weight, vocab_size)
            for guide, own in zip(guides, pairs)
        ],
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        eos_token_ids=frozenset(eos_token_ids(roles[0].model, tokenizer)),
    )


def _key(source: ModelSource) -> Any:
    """Equal for what is the same model."""
    return id(source) if isinstance(source, PreTrainedModel) else str(source)


def _shared_vocabulary(
    models: Sequence[PagedModel], tokenizers: Sequence[PreTrainedTokenizerBase | None]
) -> int:
    """The size of the vocabulary that all models share. MismatchedVocabulary if they do not.

    ``models``: the base first. ``tokenizers``: theirs.
    """
    tokenizer, size = tokenizers[0], models[0].vocab_size
    if tokenizer is not None:
        size = min(size, tokenizer_size(tokenizer))
        for model, own in zip(models[1:], tokenizers[1:]):
            if own is not None and own is not tokenizer:
                check_same_vocabulary(tokenizer, own, model.name)
            if model.vocab_size < size:
                raise MismatchedVocabulary(
                    f"{model.name} has logits for {model.vocab_size} tokens, but the base's "
                    f"vocabulary has {size}"
                )
    return min([size, *(model.vocab_size for model in models[1:])])


def _passes(
    models: Sequence[PreTrainedModel], max_pass_tokens: int | None, max_rows: int
) -> tuple[int, int]:
    """Tokens of a pass, and bytes that passes and padded heads need: measured on CUDA, where they
    count.

    ``models``: the base, and those of the guides. On a CPU pages leave far more than that.
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
