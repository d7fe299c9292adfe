"""Named: the models of an engine by their configs and tokenizers, before any weights are read.

What does not go together is found here, where it costs a moment, and not after minutes of loading.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from w2s_fast.engine.encoders import own_tokenizer, templates_of, tokenizer_beside, tokenizer_of
from w2s_fast.engine.sources import key_of, resolve
from w2s_fast.errors import InvalidRequest, MismatchedVocabulary
from w2s_fast.models import AdapterFiles, ModelSource, exact_device, look_at_model, pick_device
from w2s_fast.remote import RemoteBase
from w2s_fast.search import Guide
from w2s_fast.text import check_same_vocabulary, check_template, tokenizer_size

REMOTE = "the base is remote, and its tokens are not known"


class Named(NamedTuple):
    """What a model is to do: two with the same source, adapter, tokenizer, template and device are
    one.

    Attributes:
        name: what errors call it.
        source: of its weights.
        adapter: what is added to them; or None.
        device: where it lies.
    """

    name: str
    source: ModelSource
    adapter: AdapterFiles | None
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase | None
    template: str | None
    device: torch.device

    @property
    def key(self) -> tuple[Any, Any, int, str | None]:
        return self.weights_key, self.adapter_key, id(self.tokenizer), self.template

    @property
    def weights_key(self) -> tuple[Any, torch.device]:
        """Equal for the same weights on the same device."""
        return key_of(self.source), self.device

    @property
    def adapter_key(self) -> Any:
        """Equal for the same adapter; None: there is none."""
        return None if self.adapter is None else key_of(self.adapter.name)

    @property
    def vocab_size(self) -> int:
        """Width of its logits, as its config has it."""
        return int(self.config.get_text_config().vocab_size)


class NamedModels(NamedTuple):
    """A base and its guides.

    Attributes:
        base: None: it is remote.
        guides: the tuned model of each, and its untuned one, if it has one.
        differences: how each guide's vocabulary differs from the base's; None: it does not.
    """

    base: Named | None
    guides: list[list[Named]]
    differences: list[str | None]

    def distinct(self) -> list[Named]:
        """Each model once, by the first of its names; the base first."""
        every = _flat(self.guides)
        every = every if self.base is None else [self.base, *every]
        first = {model.key: model for model in reversed(every)}
        return [model for model in every if first[model.key] is model]


def name_models(
    base: ModelSource | RemoteBase,
    guides: Sequence[Guide],
    tokenizer: PreTrainedTokenizerBase | None,
    prompt_template: str | None,
    device: torch.device,
) -> NamedModels:
    """Read configs and tokenizers, and compare vocabularies.

    A remote base shares its vocabulary with nobody. ``tokenizer``: the base's; None: the one that
    lies with it. ``device``: of the base, and of guides that name none.

    Raises:
        UnsupportedModel: there is no causal language model where a name leads.
        MismatchedVocabulary: a guide's models do not share one vocabulary, or it cannot be told.
        InvalidRequest: a template or a device that cannot be used, or a loaded model that is named
            on two devices.
    """
    remote = isinstance(base, RemoteBase)
    templates = templates_of(guides)
    configs: dict[Any, PreTrainedConfig] = {}
    tokenizers: dict[tuple[Any, int | None], PreTrainedTokenizerBase | None] = {}

    def named(
        name: str,
        source: ModelSource,
        template: str | None,
        where: torch.device,
        given: PreTrainedTokenizerBase | None = None,
        beside: ModelSource | None = None,
    ) -> Named:
        weights, adapter = resolve(source, beside)
        key = key_of(weights)
        # First: a path that is none is an error of its model, and not of its tokenizer.
        if key not in configs:
            configs[key] = look_at_model(weights)
        reads = (key_of(source), None if given is None else id(given))
        if reads not in tokenizers and remote:
            tokenizers[reads] = own_tokenizer(name, source, weights, given)
        elif reads not in tokenizers:
            tokenizers[reads] = tokenizer_of(source, weights, tokenizer, given)
        if not isinstance(source, PreTrainedModel):
            name = f"{name} ({source})"
        check_template(name, template, tokenizers[reads])
        return Named(name, weights, adapter, configs[key], tokenizers[reads], template, where)

    as_base = None
    if not isinstance(base, RemoteBase):
        of_base, _ = resolve(base)
        configs[key_of(of_base)] = look_at_model(of_base)
        tokenizer = tokenizer_beside(base, of_base) if tokenizer is None else tokenizer
        tokenizers[key_of(base), None] = tokenizer
        as_base = named("base", base, prompt_template, device)
    of_guides: list[list[Named]] = []
    for g, (guide, (of_tuned, of_untuned)) in enumerate(zip(guides, templates)):
        number, there = f" {g}" if len(guides) > 1 else "", device_of(guide, device)
        tuned = named(
            f"tuned{number}", guide.tuned, of_tuned, there, guide.tokenizer, guide.untuned
        )
        own = [tuned]
        if guide.untuned is not None:
            own.append(named(f"untuned{number}", guide.untuned, of_untuned, there, guide.tokenizer))
        of_guides.append(own)
    _check_loaded_once([*([] if as_base is None else [as_base]), *_flat(of_guides)])
    differences: list[str | None] = [REMOTE] * len(of_guides)
    if as_base is None:
        for own in of_guides:
            _check_one_vocabulary(own)
    else:
        differences = [_difference(tokenizer, own) for own in of_guides]
        sharing = [own for own, why in zip(of_guides, differences) if why is None]
        shared_vocabulary([as_base, *_flat(sharing)], tokenizer)
    for own, why in zip(of_guides, differences):
        if why is not None:
            shared_vocabulary(own, own[0].tokenizer)
    return NamedModels(as_base, of_guides, differences)


def device_of(guide: Guide, device: torch.device) -> torch.device:
    """Where a guide's models lie, in an engine on ``device``. InvalidRequest: they cannot."""
    return exact_device(device if guide.device is None else pick_device(guide.device))


def _check_loaded_once(models: Sequence[Named]) -> None:
    """InvalidRequest: a loaded model, of which there is one, is named on two devices."""
    on: dict[Any, Named] = {}
    for model in models:
        first = on.setdefault(key_of(model.source), model)
        if isinstance(model.source, PreTrainedModel) and model.device != first.device:
            raise InvalidRequest(
                f"{first.name} and {model.name} are one loaded {type(model.source).__name__}, on "
                f"{first.device} and on {model.device}; allowed: one device, or its path, which is "
                "read for each of them"
            )


class HasLogits(Protocol):
    """A model: what errors call it, and the width of its logits."""

    @property
    def name(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...


def shared_vocabulary(
    models: Sequence[HasLogits], tokenizer: PreTrainedTokenizerBase | None
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


def _flat(lists: Iterable[Sequence[Named]]) -> list[Named]:
    return [model for own in lists for model in own]


def _difference(base: PreTrainedTokenizerBase | None, models: Sequence[Named]) -> str | None:
    """How a guide's vocabulary differs from the base's; None: it does not.

    MismatchedVocabulary if its models do not share one.
    """
    found = []
    for model in models:
        try:
            if base is not None and model.tokenizer is not None and model.tokenizer is not base:
                check_same_vocabulary(base, model.tokenizer, model.name)
        except MismatchedVocabulary as error:
            found.append(error)
    if not found:
        return None
    if len(found) < len(models):
        raise MismatchedVocabulary(f"{found[0]}; the models of a guide must share a vocabulary")
    _check_one_vocabulary(models)
    return str(found[0])


def _check_one_vocabulary(models: Sequence[Named]) -> None:
    """MismatchedVocabulary: a guide's models, which have tokenizers of their own, do not share
    one."""
    first, *others = [model for model in models if model.tokenizer is not None]
    for other in others:
        if first.tokenizer is not None and other.tokenizer is not None:
            check_same_vocabulary(first.tokenizer, other.tokenizer, other.name, first.name)
