"""What attention reads in a search, against what it must read.

    python -m bench.attention_reads --prompt 512 4096 --new-tokens 256

Runs whole searches over a tiny random model and counts, at every decoding step, what the plan makes
attention read: keys, every segment once, and different pages. Beside it stand what attention
without sharing reads, and the ideal of P + W h + W K l keys: the prompt once, each hypothesis's
history once, and the new tokens of each row (pages: those that these pieces touch).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from w2s_fast import Engine, Guide, SearchParams
from w2s_fast.attention import RowTree
from w2s_fast.cache import Int32Array, Ints
from w2s_fast.decoding import Decoding
from w2s_fast.models import PagedModel

PAGE_SIZE = 16


@dataclass
class Reads:
    """Sums over the decoding steps of a search of W K rows; ``worst_pages``: the worst step."""

    steps: int = 0
    flat_keys: int = 0
    keys: int = 0
    ideal_keys: int = 0
    pages: int = 0
    ideal_pages: int = 0
    worst_pages: float = 0.0

    def add(
        self,
        tree: RowTree,
        table: Int32Array,
        lengths: Int32Array,
        prompt: int,
        params: SearchParams,
    ) -> None:
        """Count one step; all rows have the same length."""
        width, rows = params.beam_width, params.beam_width * params.successors
        length, chunk, page_size = int(lengths[0]), params.chunk_length, PAGE_SIZE
        assert len(lengths) == rows and chunk is not None
        inherited = prompt + (length - prompt - 1) // chunk * chunk

        def touched(begin: int, end: int) -> int:
            return -(-end // page_size) - begin // page_size

        pages = tree.pages_read(table, lengths, page_size)
        ideal = touched(0, prompt) + width * touched(prompt, inherited)
        ideal += rows * touched(inherited, length)
        self.steps += 1
        self.flat_keys += int(lengths.sum())
        self.keys += tree.keys_read(lengths)
        self.ideal_keys += prompt + width * (inherited - prompt) + rows * (length - inherited)
        self.pages += pages
        self.ideal_pages += ideal
        self.worst_pages = max(self.worst_pages, pages / ideal)


@contextmanager
def watched(seen: Callable[[PagedModel, Ints, RowTree], object]) -> Iterator[None]:
    """Calls ``seen(model, slots, tree)`` after each decoding step of every model."""
    begin, step = Decoding.__init__, Decoding.step
    asked: dict[int, Any] = {}

    def begins(self: Decoding, model: PagedModel, slots: Ints, steps: int, tree: RowTree) -> None:
        begin(self, model, slots, steps, tree)
        asked[id(self)] = (model, slots, tree)

    def steps(self: Decoding, tokens: torch.Tensor) -> torch.Tensor:
        hidden = step(self, tokens)
        seen(*asked[id(self)])
        return hidden

    with (
        mock.patch.object(Decoding, "__init__", begins),
        mock.patch.object(Decoding, "step", steps),
    ):
        yield


def search(prompt: int, new_tokens: int, width: int = 4, successors: int = 4) -> Reads:
    """Count the reads of the base in one search with chunks of 5 tokens."""

    def model(seed: int) -> GPT2LMHeadModel:
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=64, n_positions=prompt + new_tokens, n_embd=8, n_layer=1, n_head=1,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        return GPT2LMHeadModel(config)

    base, tuned, untuned = (model(seed) for seed in range(3))
    room = prompt + 2 * width * successors * new_tokens + 4096
    engine = Engine(base, Guide(tuned, untuned), kv_cache_tokens=room, page_size=PAGE_SIZE)
    params = SearchParams(
        beam_width=width, successors=successors, chunk_length=5, max_new_tokens=new_tokens,
        ignore_eos=True,
    )  # fmt: skip
    reads = Reads()

    def count(model: PagedModel, slots: Ints, tree: RowTree) -> None:
        table = model.pool.page_table(slots).numpy()
        reads.add(tree, table, model.pool.lengths(slots), prompt, params)

    tokens = np.random.default_rng(0).integers(64, size=prompt).tolist()
    with watched(count):
        engine.generate([tokens], params)
    return reads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompt", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--successors", type=int, default=4)
    args = parser.parse_args()
    print(f"W={args.width} K={args.successors} L=5, {args.new_tokens} new tokens; a step reads")
    print(f"{'prompt':>7}{'keys':>9}{'ideal':>9}{'ratio':>7}{'unshared':>10}"
          f"{'pages':>8}{'ideal':>8}{'ratio':>7}{'worst step':>12}")  # fmt: skip
    for prompt in args.prompt:
        r = search(prompt, args.new_tokens, args.width, args.successors)
        print(
            f"{prompt:>7}{r.keys / r.steps:>9.0f}{r.ideal_keys / r.steps:>9.0f}"
            f"{r.keys / r.ideal_keys:>7.3f}{r.flat_keys / r.steps:>10.0f}"
            f"{r.pages / r.steps:>8.1f}{r.ideal_pages / r.steps:>8.1f}"
            f"{r.pages / r.ideal_pages:>7.3f}{r.worst_pages:>12.3f}"
        )


if __name__ == "__main__":
    main()
