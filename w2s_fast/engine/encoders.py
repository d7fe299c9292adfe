"""Encoders: every model's own way from a prompt to its tokens, by its tokenizer and template."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from w2s_fast.errors import InvalidRequest, MismatchedVocabulary, UnsupportedModel
from w2s_fast.models import ModelSource, PagedModel, load_tokenizer
from w2s_fast.search import Guide
from w2s_fast.text import PromptEncoder


def templates_of(guides: Sequence[Guide]) -> list[tuple[str | None, str | None]]:
    """For each guide its tuned model's prompt template, and its untuned one's.

    Raises:
        InvalidRequest: what a guide has is neither one for both nor a pair; says which guide.
    """
    found: list[tuple[str | None, str | None]] = []
    for g, guide in enumerate(guides):
        given = guide.prompt_template
        if given is None or isinstance(given, str):
            found.append((given, given))
        elif isinstance(given, (tuple, list)) and len(given) == 2:
            found.append((given[0], given[1]))
        else:
            number = f" {g}" if len(guides) > 1 else ""
            raise InvalidRequest(
                f"prompt_template of guide{number} is {given!r}; allowed: a string for both of its "
                "models, or a pair: for its tuned and for its untuned one"
            )
    return found


def tokenizer_of(
    source: ModelSource,
    weights: ModelSource,
    base: PreTrainedTokenizerBase | None,
    given: PreTrainedTokenizerBase | None = None,
) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a guide's model: ``given``, or the one that lies with it.

    Where there is none, it is the base's; where it has no chat template, it gets the base's. None
    if nobody has one: prompts are token ids.

    Args:
        weights: ``source``, or the model that this adapter is for.

    Raises:
        MismatchedVocabulary: it has one, and the base has none to compare it with.
    """
    own = tokenizer_beside(source, weights) if given is None else given
    if own is None:
        return base
    if base is None:
        raise MismatchedVocabulary(
            "a guide has a tokenizer, and the base has none: whether they share a vocabulary "
            "cannot be told; give Engine(tokenizer=...)"
        )
    if own.chat_template is None and given is None:
        own.chat_template = base.chat_template
    return own


def own_tokenizer(
    name: str,
    source: ModelSource,
    weights: ModelSource,
    given: PreTrainedTokenizerBase | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a guide's model where the base has none to lend.

    Raises:
        MismatchedVocabulary: it has none of its own.
    """
    own = tokenizer_beside(source, weights) if given is None else given
    if own is None:
        raise MismatchedVocabulary(
            f"{name} has no tokenizer, and a remote base has none to lend; give "
            "Guide(tokenizer=...)"
        )
    return own


def tokenizer_beside(source: ModelSource, weights: ModelSource) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies with a model, or with an adapter; else with that adapter's model.

    ``weights``: ``source``, or the model that this adapter is for.
    """
    if weights is source:
        return load_tokenizer(source)
    try:
        own = load_tokenizer(source)
    except UnsupportedModel:  # on the hub one does not see before whether there is one
        own = None
    return load_tokenizer(weights) if own is None else own


def make_encoder(
    model: PagedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    template: str | None,
    vocab_size: int,
) -> PromptEncoder:
    """For the prompts of one model; one that is empty starts from its own BOS."""
    bos = getattr(tokenizer, "bos_token_id", None)
    if tokenizer is None:
        bos = getattr(model.model.config.get_text_config(), "bos_token_id", None)
    if bos is not None and not 0 <= bos < model.vocab_size:
        bos = None
    return PromptEncoder(
        model.name,
        tokenizer,
        template,
        vocab_size=vocab_size,
        bos_token_id=bos,
        own_vocab_size=model.vocab_size,
    )
