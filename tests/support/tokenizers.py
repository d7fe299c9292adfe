"""Tokenizers of the kinds that models come with, each over a handful of tokens."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

WORDS = ("the", "user", "end", "ok")


def _wrap(tokenizer: Tokenizer, special: list[str | AddedToken], **options: Any) -> Any:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)
    fast.add_special_tokens({"additional_special_tokens": special})
    return fast


def byte_level(*special: str | AddedToken, added: tuple[str, ...] = (), **options: Any) -> Any:
    """BPE over bytes, as GPT-2, Llama 3 and Qwen have it; a few words are tokens."""
    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = _merges(vocabulary, "\u0120")
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = _wrap(tokenizer, list(special), **options)
    fast.add_tokens(list(added))
    return fast


def metaspace(*special: str | AddedToken, scheme: str = "first", **options: Any) -> Any:
    """BPE over characters with a fallback to bytes, as Llama 2 and Mistral have it: a text begins
    with a space that nobody wrote. ``scheme``: where else; ``"legacy"``: by a normaliser."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for token in [f"<0x{b:02X}>" for b in range(256)] + ["\u2581"] + list(map(chr, range(33, 127))):
        vocabulary[token] = len(vocabulary)
    merges = _merges(vocabulary, "\u2581")
    model = models.BPE(
        vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    tokenizer = Tokenizer(model)
    start = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if scheme == "legacy":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence([*start, decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return _wrap(
        tokenizer,
        list(special),
        **{"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", **options},
    )


def unigram(*special: str, unknown: bool = True) -> Any:
    """Unigram, as T5 has it: EOS is put behind every text, and stands among the pieces.

    ``unknown``: there is a token for unknown characters; else they are errors.
    """
    pieces = [("</s>", 0.0), ("\u2581", -2.0)] + [(c, -4.0) for c in map(chr, range(33, 127))]
    pieces += [(word, -3.0) for word in WORDS] + [("\u2581" + word, -3.0) for word in WORDS]
    if unknown:
        pieces.append(("<unk>", 0.0))
    model = models.Unigram(pieces, unk_id=len(pieces) - 1 if unknown else None)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 0)]
    )
    options = {"unk_token": "<unk>"} if unknown else {}
    return _wrap(tokenizer, list(special), eos_token="</s>", **options)


def words(*special: str | AddedToken, unknown: str = "[UNK]") -> Any:
    """Whole words in lower case; a special token that is a word is matched whatever its case."""
    vocabulary = {t: i for i, t in enumerate([unknown, "[eot]", *WORDS, ":", "[", "]", "eot"])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=unknown))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return _wrap(tokenizer, list(special), unk_token=unknown)


def with_gaps(tokenizer: Any, *ids: int) -> Any:
    """``tokenizer``, for which these ids stand for nothing from here on."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = parts["model"]["vocab"]
    parts["model"]["vocab"] = {t: i for t, i in vocabulary.items() if i not in ids}
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(parts))
    return tokenizer


def _merges(vocabulary: dict[str, int], space: str) -> list[tuple[str, str]]:
    """Merges that make the words, and each with a space before it; they join the vocabulary."""
    pairs = [(word[:end], word[end]) for word in WORDS for end in range(1, len(word))]
    pairs += [(space, word) for word in WORDS]
    for left, right in pairs:
        vocabulary.setdefault(left + right, len(vocabulary))
    return pairs


def syllables(size: int) -> Any:
    """Tokens of a few letters, whose texts stand one behind the other; 0 ends, 1 begins a text."""
    letters = ["a", "b", "c", "ab", "bc", "ca", "abc", "aa", "bb", "cc", "ba", "cb", "ac", " "]
    letters += ["\n", "a ", "b\n", "x", "abcabc", "y"]
    vocabulary = {text: i for i, text in enumerate(["<eos>", "<bos>", *letters][:size])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="x"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>", unk_token="x"
    )
