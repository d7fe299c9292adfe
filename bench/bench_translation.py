"""Candidates of a round in another vocabulary: 1,024 rows of English text that grow by a chunk.

The guide's tokenizers are trained here, on the same text, to a few thousand tokens. ``call`` is the
tokenizer's own part: in one call, of all texts from their last safe places on, what has not come
before (``-s`` shows how much that is); ``translated`` is all from the base's tokens to the guide's,
what it takes to decode them included.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from tests.support.trained_tokenizers import trained_on
from w2s_fast.text import GrowingTexts, PromptEncoder, Said, Translator

pytestmark = pytest.mark.benchmark(group="translation")

ROOT = Path(__file__).parents[1]
ROWS = 1024
Timed = Callable[..., None]
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

    def forget(self) -> Callable[[], None]:
        """What takes back what a round has left in the translator, as of now."""
        pieces = self.translator._pieces
        assert pieces is not None
        known = dict(pieces._known)

        def take_back() -> None:
            pieces._known = dict(known)

        return take_back


@pytest.fixture
def timed(benchmark: BenchmarkFixture, rounds: Callable[[float], int]) -> Timed:
    """Times a call, each time after a setup."""

    def time_rounds(run: Callable[[], object], setup: Callable[[], None] = lambda: None) -> None:
        begin = time.perf_counter()
        run()
        count = rounds(time.perf_counter() - begin)
        benchmark.pedantic(run, setup=setup, rounds=count)

    return time_rounds


@pytest.mark.parametrize("chunk", [5, 30])
@pytest.mark.parametrize("kind", KINDS)
def test_translated(timed: Timed, kind: str, chunk: int) -> None:
    growing = Growing(kind, chunk)
    timed(growing.round, growing.forget())


@pytest.mark.parametrize("chunk", [5, 30])
@pytest.mark.parametrize("kind", KINDS)
def test_call(timed: Timed, kind: str, chunk: int) -> None:
    growing = Growing(kind, chunk)
    pieces = growing.translator._pieces
    assert pieces is not None
    asked: list[Sequence[str]] = []
    with mock.patch.object(pieces, "encode", side_effect=_noting(asked, pieces.encode)):
        growing.round()
    every = [piece for own in asked for piece in own]
    print(f"{len(every)} pieces, {sum(map(len, every))} characters for {ROWS} rows")
    timed(lambda: pieces.encode(every))


def _noting(asked: list[Sequence[str]], encode: Callable[..., Any]) -> Callable[..., Any]:
    def noted(pieces: Sequence[str]) -> Any:
        asked.append(pieces)
        return encode(pieces)

    return noted
