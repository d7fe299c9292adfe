"""Whether models share one vocabulary, and how large it is."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from w2s_fast.errors import MismatchedVocabulary


def tokenizer_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest token id that the tokenizer knows."""
    return int(max(tokenizer.get_vocab().values(), default=-1)) + 1


def ids_without_token(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> frozenset[int]:
    """Ids below ``vocab_size`` that stand for nothing: gaps in the tokenizer's vocabulary."""
    missing = frozenset(range(vocab_size)).difference(tokenizer.get_vocab().values())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # Where two ids have one text, the map from texts names one of them only.
    return (
        missing if backend is None else frozenset(i for i in missing if not backend.id_to_token(i))
    )


def check_same_vocabulary(
    base: PreTrainedTokenizerBase,
    guide: PreTrainedTokenizerBase,
    name: str,
    other: str = "the base",
) -> None:
    """Compare token-to-id maps and special tokens; equal sizes alone say nothing.

    A guide may have some special tokens more, behind all of the base's, as tuning scripts add
    ``[PAD]``: they are padding.

    ``name``, ``other``: what the guide's model and the base are called.

    Raises:
        MismatchedVocabulary: names the guide's model and the first difference.
    """
    ours, size = base.get_vocab(), tokenizer_size(base)
    more = {i for i in _special(guide) if i >= size}
    theirs = {token: i for token, i in guide.get_vocab().items() if i not in more}
    if ours != theirs:
        token = min(
            (t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t)),
            key=lambda t: (ours.get(t, len(ours)), t),
        )
        raise MismatchedVocabulary(
            f"{name} has another vocabulary than {other}: token {token!r} is "
            f"{ours.get(token)} in that of {other} and {theirs.get(token)} in its own"
        )
    different = sorted(_special(base) ^ (_special(guide) - more))
    if different:
        raise MismatchedVocabulary(
            f"{name} has other special tokens than {other}: ids {different[:5]}"
        )


def eos_token_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> frozenset[int]:
    """The ids that end a response: a model may have several."""
    found: set[int] = set()
    generation = getattr(model, "generation_config", None)
    for value in (
        getattr(generation, "eos_token_id", None),
        getattr(model.config.get_text_config(), "eos_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
    ):
        if isinstance(value, int):
            found.add(value)
        elif value is not None:
            found.update(int(token) for token in value)
    return frozenset(found)


def _special(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
