"""ServedModels: from what a caller names to models that run, checked against each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from w2s_fast.engine.encoders import make_encoder, templates_of, tokenizer_beside, tokenizer_of
from w2s_fast.engine.foreign import foreign_guides
from w2s_fast.engine.loaded import Loaded, key_of
from w2s_fast.errors import MismatchedVocabulary
from w2s_fast.models import (
    Adapter,
    ModelSource,
    PagedModel,
    activation_bytes,
    activations_of,
    free_bytes,
    kv_tokens_that_fit,
    usual_pass_tokens,
)
from w2s_fast.search import ForeignGuides, Guide, PagedGuide
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
        models: the base, and behind it those of guides that share its vocabulary, each once.
        guides: all of them, in their order. sharing: those that share the base's vocabulary.
        foreign: the others; None: there are none.
        tokenizer: the base's; None: prompts are token ids.
        vocab_size: of the vocabulary that ``models`` share; ids from here on are padding.
        eos_token_ids: what ends a response.
        encoder_of: for the prompts of each model.
    """

    models: list[PagedModel]
    guides: list[PagedGuide]
    sharing: list[PagedGuide]
    foreign: ForeignGuides | None
    tokenizer: PreTrainedTokenizerBase | None
    vocab_size: int
    eos_token_ids: frozenset[int]
    encoder_of: dict[PagedModel, PromptEncoder]

    @property
    def base(self) -> PagedModel:
        return self.models[0]

    @property
    def of_guides(self) -> list[PagedModel]:
        """Those that only guides have."""
        return self.models[1:]

    @property
    def encoders(self) -> list[PromptEncoder]:
        """For the prompts of each of ``models``."""
        return [self.encoder_of[model] for model in self.models]

    def encoders_of(self, guide: PagedGuide) -> list[PromptEncoder]:
        """For the prompts of a guide's models."""
        return [self.encoder_of[model] for model in guide.models]

    def is_foreign(self, guide: PagedGuide) -> bool:
        return guide not in self.sharing


class _Role(NamedTuple):
    """What a model is to do: two roles with the same model, adapter, tokenizer and template are
    one.

    Attributes:
        name: what errors call it.
    """

    name: str
    model: PreTrainedModel
    adapter: Adapter | None
    tokenizer: PreTrainedTokenizerBase | None
    template: str | None

    @property
    def key(self) -> tuple[int, int, int, str | None]:
        return id(self.model), id(self.adapter), id(self.tokenizer), self.template


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
        MismatchedVocabulary: a guide's models do not share one vocabulary, or it cannot be told.
        InvalidRequest: there is no room for any tokens, or a template that cannot be used.
    """
    templates = templates_of(guides)
    # The base first: a path that is none is an error of its model, and not of its tokenizer.
    loaded = Loaded(device, dtype)
    loaded.of(base)
    if tokenizer is None:
        tokenizer = tokenizer_beside(base)
    tokenizers: dict[tuple[Any, int | None], PreTrainedTokenizerBase | None]
    tokenizers = {(key_of(base), None): tokenizer}

    def role(
        name: str,
        source: ModelSource,
        template: str | None,
        given: PreTrainedTokenizerBase | None = None,
        beside: ModelSource | None = None,
    ) -> _Role:
        model, adapter = loaded.of(source, beside)
        reads = (key_of(source), None if given is None else id(given))
        if reads not in tokenizers:
            tokenizers[reads] = tokenizer_of(source, tokenizer, given, beside)
        if not isinstance(source, PreTrainedModel):
            name = f"{name} ({source})"
        return _Role(name, model, adapter, tokenizers[reads], template)

    roles = [role("base", base, prompt_template)]
    of_guides: list[list[_Role]] = []
    for g, (guide, (of_tuned, of_untuned)) in enumerate(zip(guides, templates)):
        number = f" {g}" if len(guides) > 1 else ""
        own = [role(f"tuned{number}", guide.tuned, of_tuned, guide.tokenizer, guide.untuned)]
        if guide.untuned is not None:
            own.append(role(f"untuned{number}", guide.untuned, of_untuned, guide.tokenizer))
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
            adapter=role.adapter,
        )
        for role in roles
    ]
    paged = dict(zip((role.key for role in roles), models))
    named = {paged[role.key]: role for role in roles}
    pairs = [[paged[role.key] for role in own] for own in of_guides]
    differences = [_difference(tokenizer, [named[model] for model in own]) for own in pairs]
    shared = list(
        dict.fromkeys([models[0], *_flat(p for p, why in zip(pairs, differences) if why is None)])
    )
    vocab_size = _shared_vocabulary(shared, tokenizer)
    sizes = dict.fromkeys(shared, vocab_size)
    for of_one, why in zip(pairs, differences):
        if why is not None:
            size = _shared_vocabulary(of_one, named[of_one[0]].tokenizer)
            sizes.update(dict.fromkeys(of_one, size))
    for model, size in sizes.items():
        reader = tokenizer if model in shared else named[model].tokenizer
        if reader is not None and (gaps := ids_without_token(reader, size)):
            model.forbid(gaps)
    encoder_of = {
        model: make_encoder(model, named[model].tokenizer, named[model].template, size)
        for model, size in sizes.items()
    }
    paged_guides = [
        PagedGuide(own[0], own[1] if len(own) > 1 else None, guide.weight, sizes[own[0]])
        for guide, own in zip(guides, pairs)
    ]
    return ServedModels(
        models=shared,
        guides=paged_guides,
        sharing=[guide for guide, why in zip(paged_guides, differences) if why is None],
        foreign=foreign_guides(paged_guides, differences, encoder_of, tokenizer),
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        eos_token_ids=frozenset(eos_token_ids(roles[0].model, tokenizer)),
        encoder_of=encoder_of,
    )


def _flat(lists: Iterable[Sequence[PagedModel]]) -> list[PagedModel]:
    return [model for own in lists for model in own]


def _difference(base: PreTrainedTokenizerBase | None, roles: Sequence[_Role]) -> str | None:
    """How a guide's vocabulary differs from the base's; None: it does not.

    MismatchedVocabulary if its models do not share one.
    """
    found = []
    for role in roles:
        try:
            if base is not None and role.tokenizer is not None and role.tokenizer is not base:
                check_same_vocabulary(base, role.tokenizer, role.name)
        except MismatchedVocabulary as error:
            found.append(error)
    if not found:
        return None
    first, *others = [role for role in roles if role.tokenizer is not None]
    if len(found) < len(roles):
        raise MismatchedVocabulary(f"{found[0]}; the models of a guide must share a vocabulary")
    for other in others:
        if first.tokenizer is not None and other.tokenizer is not None:
            check_same_vocabulary(first.tokenizer, other.tokenizer, other.name, first.name)
    return str(found[0])


def _shared_vocabulary(
    models: Sequence[PagedModel], tokenizer: PreTrainedTokenizerBase | None
) -> int:
    """The size of the vocabulary that models share. MismatchedVocabulary: one is too small for it.

    ``tokenizer``: of the first; the others' are of the same vocabulary.
    """
    size = models[0].vocab_size
    if tokenizer is not None:
        size = min(size, tokenizer_size(tokenizer))
        for model in models[1:]:
            if model.vocab_size < size:
                raise MismatchedVocabulary(
                    f"{model.name} has logits for {model.vocab_size} tokens, but the vocabulary "
                    f"of {models[0].name} has {size}; a guide of another one needs its tokenizer "
                    "beside it, or Guide(tokenizer=...)"
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
