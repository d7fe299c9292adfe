"""Candidates of a round in another vocabulary: 1,024 rows of English text that grow by a chunk.

The guide's tokenizers are trained here, on the same kind of text, to a few thousand tokens.
``call`` is the tokenizer's own part: all texts from their last safe places on, in one call;
``translated`` is all from the base's tokens to the guide's, what it takes to decode them included.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from tests.support.trained_tokenizers import trained_on
from w2s_fast.text import GrowingTexts, PromptEncoder, Said, Translator

pytestmark = pytest.mark.benchmark(group="translation")

ROOT = Path(__file__).parents[1]
ROWS = 1024
BEFORE = 8  # chunks that a response has
KINDS = ("bytes-llama3", "bpe-first", "unigram-bytes", "wordpiece")


@cache
def english() -> str:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return "\n".join(page.read_text() for page in pages)


class Growing:
    """Responses of ``BEFORE`` chunks, and the same with one more, in the base's tokens."""

    def __init__(self, kind: str, chunk: int) -> None:
        base = trained_on("bytes-gpt2", english(), 3000)
        guide = trained_on(kind, english(), 3000)
        encoder = PromptEncoder("guide", guide, vocab_size=len(guide), bos_token_id=None)
        self.translator: Translator = encoder.translator()
        self.listener = GrowingTexts(base)
        ids = base(english())["input_ids"]
        drawing = random.Random(0)
        starts = [drawing.randrange(len(ids) - (BEFORE + 1) * chunk) for _ in range(ROWS)]
        root = self.translator.begin(encoder.as_text("Question: why is it so?\nAnswer:"))
        self.said: list[Any] = [Said()] * ROWS
        self.texts: list[Any] = [root] * ROWS
        for end in range(chunk, (BEFORE + 1) * chunk, chunk):
            self.tokens = [ids[start : start + end] for start in starts]
            self.said = self.listen()
            found = self.translator.extend(self.texts, [said.text for said in self.said])
            self.texts = [grown.text for grown in found]  # type: ignore[union-attr]
        self.tokens = [ids[start : start + (BEFORE + 1) * chunk] for start in starts]

    def listen(self) -> list[Any]:
        prompt = [0] * 8
        return list(
            self.listener.extend(
                [(prompt, tokens, said, False) for tokens, said in zip(self.tokens, self.said)]
            )
        )

    def round(self) -> None:
        self.translator.extend(self.texts, [said.text for said in self.listen()])


@pytest.fixture
def timed(
    benchmark: BenchmarkFixture, rounds: Callable[[float], int]
) -> Callable[[Callable[[], object]], None]:
    """Times a call; the one before brings memory and caches along."""

    def time_rounds(run: Callable[[], object]) -> None:
        begin = time.perf_counter()
        run()
        benchmark.pedantic(run, rounds=rounds(time.perf_counter() - begin))

    return time_rounds


@pytest.mark.parametrize("chunk", [5, 30])
@pytest.mark.parametrize("kind", KINDS)
def test_translated(timed: Callable[[Callable[[], object]], None], kind: str, chunk: int) -> None:
    timed(Growing(kind, chunk).round)


@pytest.mark.parametrize("chunk", [5, 30])
@pytest.mark.parametrize("kind", KINDS)
def test_call(timed: Callable[[Callable[[], object]], None], kind: str, chunk: int) -> None:
    growing = Growing(kind, chunk)
    pieces = growing.translator._pieces
    assert pieces is not None
    windows = [
        (text.tail or "") + said.text[len(text.said) :]
        for text, said in zip(growing.texts, growing.listen())
    ]
    timed(lambda: pieces.encode(windows))
