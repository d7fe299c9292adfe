"""ServedModels: from what a caller names to models that run, checked against each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from w2s_fast.engine.encoders import make_encoder
from w2s_fast.engine.foreign import foreign_guides, guides_of_texts
from w2s_fast.engine.named import name_models, shared_vocabulary
from w2s_fast.engine.sources import key_of
from w2s_fast.errors import InvalidRequest
from w2s_fast.models import (
    Adapter,
    ModelSource,
    PagedModel,
    Ranks,
    activation_bytes,
    activations_of,
    exact_device,
    free_bytes,
    kv_tokens_that_fit,
    load_model,
    read_adapter,
    usual_pass_tokens,
)
from w2s_fast.remote import RemoteBase
from w2s_fast.search import ForeignGuides, Guide, PagedGuide
from w2s_fast.text import PromptEncoder, eos_token_ids, ids_without_token

_MAX_SLOTS = 4096


@dataclass(frozen=True)
class ServedModels:
    """A base and its guides, each model over pages of its own, and how prompts become their tokens.

    Attributes:
        models: the base, and behind it those of guides that share its vocabulary, each once; none
            where the base is remote.
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
        """InvalidRequest: it is remote."""
        if not self.models:
            raise InvalidRequest(
                "the base is remote: its tokens, and their log-probs, are not known here"
            )
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
        """Whether it has another vocabulary than the base."""
        return any(model not in self.models for model in guide.models)

    def alone(self, name: str) -> PagedGuide:
        """One model whose log-probs are all that counts. InvalidRequest: there is none of the name.

        ``name``: ``"base"``, ``"tuned"``, ``"untuned"``; of several guides with their number.
        """
        named = {"base": self.base} if self.models else {}
        for g, guide in enumerate(self.guides):
            number = f" {g}" if len(self.guides) > 1 else ""
            roles = (f"tuned{number}", f"untuned{number}")
            named.update(zip(roles, guide.models))
        if name not in named:
            raise InvalidRequest(f"there is no model {name!r}; allowed: {', '.join(named)}")
        return PagedGuide(named[name], None, 1.0, self.encoder_of[named[name]].vocab_size)


def serve_models(
    base: ModelSource | RemoteBase,
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
    ranks: Ranks | None = None,
) -> ServedModels:
    """Load the models, and give each its pages; see :class:`w2s_fast.Engine` for the arguments.

    Where the base is remote, guides are all that is loaded. Among ``ranks`` the base is divided,
    and guides, if they are the same model; each rank has all of the others.

    What can be refused by configs and tokenizers is refused before any weights are read. A model
    that is named twice is loaded once on a device; where its prompts are the same, it has pages
    once.

    Raises:
        UnsupportedModel: a model cannot be loaded or served.
        MismatchedVocabulary: a guide's models do not share one vocabulary, or it cannot be told.
        InvalidRequest: there is no room for any tokens, or a template or a guide's device that
            cannot be used.
    """
    device = exact_device(device)
    named = name_models(base, guides, tokenizer, prompt_template, device)
    roles, tokenizer = named.distinct(), None if named.base is None else named.base.tokenizer
    divided = None
    if ranks is not None and named.base is not None:
        divided = key_of(named.base.source)
        for role in roles:
            if role.adapter is not None and key_of(role.source) == divided:
                raise InvalidRequest(
                    f"{role.name}: an adapter of the base, with tensor_parallel; allowed: guides "
                    "over models of their own, or a merged one"
                )
    loaded: dict[Any, PreTrainedModel] = {}
    adapters: dict[Any, Adapter] = {}
    for role in roles:
        key = role.weights_key
        if key not in loaded:
            own = ranks if key_of(role.source) == divided else None
            loaded[key] = load_model(role.source, role.device, dtype, role.config, own)
        if role.adapter is not None and (key, role.adapter_key) not in adapters:
            adapters[key, role.adapter_key] = read_adapter(role.adapter, loaded[key])
    weights = [loaded[role.weights_key] for role in roles]

    tokens, pass_tokens = _room(weights, kv_cache_tokens, max_pass_tokens, max_rows, ranks)
    models = [
        PagedModel(
            weight,
            role.name,
            kv_cache_tokens=tokens,
            page_size=page_size,
            max_slots=_MAX_SLOTS,
            prefix_cache=prefix_cache,
            attention=attention_on(role.device, attention, device),
            max_pass_tokens=pass_tokens[weight.device],
            adapter=adapters.get((role.weights_key, role.adapter_key)),
            ranks=ranks if key_of(role.source) == divided else None,
        )
        for weight, role in zip(weights, roles)
    ]
    paged = dict(zip((role.key for role in roles), models))
    role_of = {paged[role.key]: role for role in roles}
    pairs = [[paged[role.key] for role in own] for own in named.guides]
    differences = named.differences
    with_base = _flat(own for own, why in zip(pairs, differences) if why is None)
    remote = isinstance(base, RemoteBase)
    shared = [] if remote else list(dict.fromkeys([models[0], *with_base]))
    vocab_size = shared_vocabulary(shared, tokenizer) if shared else 0
    sizes = dict.fromkeys(shared, vocab_size)
    for of_one, why in zip(pairs, differences):
        if why is not None:
            size = shared_vocabulary(of_one, role_of[of_one[0]].tokenizer)
            sizes.update(dict.fromkeys(of_one, size))
    for model, size in sizes.items():
        reader = tokenizer if model in shared else role_of[model].tokenizer
        if reader is not None and (gaps := ids_without_token(reader, size)):
            model.forbid(gaps)
    encoder_of = {
        model: make_encoder(model, role_of[model].tokenizer, role_of[model].template, size)
        for model, size in sizes.items()
    }
    paged_guides = [
        PagedGuide(own[0], own[1] if len(own) > 1 else None, guide.weight, sizes[own[0]])
        for guide, own in zip(guides, pairs)
    ]
    if remote:
        foreign = guides_of_texts(paged_guides, encoder_of)
    else:
        foreign = foreign_guides(paged_guides, differences, encoder_of, tokenizer)
    return ServedModels(
        models=shared,
        guides=paged_guides,
        sharing=[guide for guide, why in zip(paged_guides, differences) if why is None],
        foreign=foreign,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        eos_token_ids=frozenset(eos_token_ids(weights[0], tokenizer) if shared else ()),
        encoder_of=encoder_of,
    )


def _flat(lists: Iterable[Sequence[PagedModel]]) -> list[PagedModel]:
    return [model for own in lists for model in own]


def attention_on(there: torch.device, attention: str, device: torch.device) -> str:
    """What an engine on ``device`` that was asked for some attention computes it by elsewhere: on
    a CPU there is nothing to choose."""
    return "auto" if there.type == "cpu" and device.type != "cpu" else attention


def _room(
    weights: Sequence[PreTrainedModel],
    kv_cache_tokens: int | None,
    max_pass_tokens: int | None,
    max_rows: int,
    ranks: Ranks | None,
) -> tuple[int, dict[torch.device, int]]:
    """Tokens of each model's KV cache, and of a pass by devices; on several ranks what all have.

    Each device has a budget of its own. The tokens are those for which there is room on all.
    """
    tokens, of_pass = kv_cache_tokens or 0, {}
    for device in dict.fromkeys(model.device for model in weights):
        there = [model for model in weights if model.device == device]
        of_pass[device], activations = _passes(there, max_pass_tokens, max_rows)
        sharers = 1
        if ranks is not None:
            sharers = ranks.on_host
            (of_pass[device],) = ranks.least([of_pass[device]])
        if kv_cache_tokens is None:
            useful = tokens or _useful_tokens(weights[0], max_rows)
            tokens = kv_tokens_that_fit(there, useful, activations, sharers)
    if ranks is not None and weights:
        (tokens,) = ranks.least([tokens])
    return tokens, of_pass


def _passes(
    models: Sequence[PreTrainedModel], max_pass_tokens: int | None, max_rows: int
) -> tuple[int, int]:
    """Tokens of a pass, and bytes that passes and padded heads need: measured on CUDA, where they
    count.

    ``models``: those of one device, the one that decodes first. On a CPU pages leave far more.
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
