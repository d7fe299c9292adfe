"""Tokenizers of every kind, trained on a little text in many scripts."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

# Words of many scripts, and what stands between words: spaces, code, marks, joiners.
_WORDS = (
    "the film was a wonderful story about people who never gave up and it's said they'll win "
    "hello world don't WE'RE XmlHttpRequest foo_bar baz42 1234567 3.14 1,000 a b c aaa ababab "
    "\u4eca\u5929 \u5929\u6c14 \u6211\u4eec \u4f60\u597d\u4e16\u754c \u6771\u4eac \u3059\u3057 "
    "\u3053\u3093\u306b\u3061\u306f \u30ab\u30bf\u30ab\u30ca \uff76\uff9e \uc548\ub155 "
    "\u0645\u0631\u062d\u0628\u0627 \u0627\u0644\u0639\u0627\u0644\u0645 \u0661\u0662\u0663 "
    "\u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd \u05e2\u05d5\u05dc\u05dd "
    "\u0928\u092e\u0938\u094d\u0924\u0947 "
    "\u0915\u094d\u0937\u0924\u094d\u0930 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 "
    "caf\u00e9 cafe\u0301 "
    "\u00e5ngstr\u00f6m a\u030angstro\u0308m \ufb01n \u00bd \U0001f600 \U0001f44d\U0001f3fd "
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea "
    "\u2764\ufe0f \u00df \u0130 \u03a3\u03c2 "
    "\ufffd \u2581 \U000e0001 \u17ff\u1800"
)
WORDS = _WORDS.split()
BETWEEN = (
    " ", " ", " ", " ", "", "  ", "   ", "\n", "\n\n", "\t", "\r\n", " \n", ". ", ", ", "; ", "!",
    "?!", "...", " - ", "(", ")", "[0]", " = ", "==", "->", "\u3002", "\uff0c", "\u3001",
    "\u00a0", "\u3000",
    "'", "\"", "_", "/", "<s>", "<|x|>", "0", "12",
)  # fmt: skip

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_ALPHABET = 80  # characters with tokens, where others are bytes
BYTE = re.compile("<0x[0-9A-F]{2}>")


def drawn_text(random: random.Random, words: int) -> str:
    """Words of many scripts, with all sorts of things between them."""
    return "".join(random.choice(WORDS) + random.choice(BETWEEN) for _ in range(words))


def _corpus() -> list[str]:
    drawing = random.Random(1)
    return [drawn_text(drawing, 30) for _ in range(60)]


class _Training(NamedTuple):
    """What a tokenizer is trained on; size: of its vocabulary, None: one that fits the corpus."""

    texts: Sequence[str]
    size: int | None = None


def _wrapped(tokenizer: Tokenizer, **options: Any) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **options
    )


def _byte_level(
    training: _Training, pattern: str, size: int = 600, ignore_merges: bool = False
) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        training.texts,
        trainers.BpeTrainer(
            vocab_size=training.size or size,
            initial_alphabet=alphabet,
            special_tokens=["<s>", "</s>"],
            show_progress=False,
        ),
    )
    tokenizer.model.ignore_merges = ignore_merges
    return _wrapped(tokenizer)


def _sentencepiece_bpe(training: _Training, scheme: str) -> Any:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if scheme == "legacy":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    elif scheme == "gemma":
        tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    # As SentencePiece trains: a space only begins a piece, or makes one with other spaces.
    pieces = [
        piece for text in training.texts for word in text.split(" ") for piece in (word, " " + word)
    ]
    # Rare characters are written in bytes. Which are rare the trainer would decide by chance.
    counts = Counter("".join(pieces).replace(" ", "\u2581"))
    alphabet = sorted(sorted(counts), key=lambda sign: -counts[sign])[:_ALPHABET]
    trainer = trainers.BpeTrainer(
        vocab_size=training.size or 700,
        special_tokens=special,
        initial_alphabet=alphabet,
        limit_alphabet=_ALPHABET,
        show_progress=False,
    )
    tokenizer.train_from_iterator([*pieces, "  ", "    "] * 2, trainer)
    # The bytes are tokens of the model, and no special ones.
    parts = json.loads(tokenizer.to_str())
    parts["added_tokens"] = [a for a in parts["added_tokens"] if not BYTE.match(a["content"])]
    tokenizer = Tokenizer.from_str(json.dumps(parts))
    start = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [] if scheme == "gemma" else [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence([*start, *strip])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return _wrapped(tokenizer, unk_token="<unk>")


def _unigram(training: _Training, byte_fallback: bool, normalizer: Any = None) -> Any:
    tokenizer = Tokenizer(models.Unigram())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=training.size or 400,
        special_tokens=["<unk>", "<s>", "</s>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(training.texts, trainer)
    if byte_fallback:
        parts = json.loads(tokenizer.to_str())
        least = min(score for _, score in parts["model"]["vocab"])
        parts["model"]["vocab"] += [[f"<0x{byte:02X}>", least] for byte in range(256)]
        parts["model"]["byte_fallback"] = True
        tokenizer = Tokenizer.from_str(json.dumps(parts))
        tokenizer.decoder = decoders.Sequence(
            [
                decoders.Replace("\u2581", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[(t, tokenizer.token_to_id(t)) for t in ("<s>", "</s>")],
    )
    return _wrapped(tokenizer, unk_token="<unk>")


def _word_piece(training: _Training) -> Any:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=training.size or 500,
        special_tokens=["[UNK]", "<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(training.texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[(t, tokenizer.token_to_id(t)) for t in ("<s>", "</s>")],
    )
    return _wrapped(tokenizer, unk_token="[UNK]")


def _normalized(training: _Training, normalizer: Any) -> Any:
    found = _byte_level(training, _GPT2)
    found.backend_tokenizer.normalizer = normalizer
    return found


def _with_added(training: _Training) -> Any:
    """Added tokens that anybody's text may hold, some of which begin alike."""
    found = _byte_level(training, _LLAMA3, 500)
    found.add_tokens(["<tool>", "<tool>x", "\n\n\n", "\n\n", AddedToken("    ", normalized=False)])
    return found


_KINDS: dict[str, Callable[[_Training], Any]] = {
    "bytes-gpt2": lambda of: _byte_level(of, _GPT2),
    "bytes-llama3": lambda of: _byte_level(of, _LLAMA3, 900, ignore_merges=True),
    "bytes-gpt4o": lambda of: _byte_level(of, _GPT4O, 300),
    "bytes-nfc": lambda of: _normalized(of, normalizers.NFC()),
    "bytes-nfkc-lower": lambda of: _normalized(
        of, normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    ),
    "bytes-added": _with_added,
    "bpe-first": lambda of: _sentencepiece_bpe(of, "first"),
    "bpe-always": lambda of: _sentencepiece_bpe(of, "always"),
    "bpe-legacy": lambda of: _sentencepiece_bpe(of, "legacy"),
    "bpe-gemma": lambda of: _sentencepiece_bpe(of, "gemma"),
    "unigram-bytes": lambda of: _unigram(of, True),
    "unigram-nfkc": lambda of: _unigram(
        of,
        False,
        normalizers.Sequence(
            [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
        ),
    ),
    "wordpiece": _word_piece,
}
KINDS: Sequence[str] = tuple(_KINDS)


@cache
def trained(kind: str) -> Any:
    """The tokenizer of one of :data:`KINDS`; nobody may change it."""
    return _KINDS[kind](_Training(_corpus()))


@cache
def trained_on(kind: str, text: str, size: int) -> Any:
    """The same kind, trained on the lines of a text, with ``size`` tokens at most."""
    return _KINDS[kind](_Training(text.split("\n"), size))
