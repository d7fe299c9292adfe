"""Time of the CPU's attention over a search's tree of rows, against the same without the tree.

    python -m bench.cpu_attention --out bench/results/cpu_attention.json
    python -m bench.cpu_attention --dry-run --out dry.json         tiny shapes, a second

The shape is gpt2-small's: 12 layers of 12 heads of 64, float32, pages of 16 tokens. A request has
W = 4 hypotheses with K = 4 candidates each, a prompt, and a history of its own for each
hypothesis. Two passes are timed: a step of decoding (a chunk of 4 under one plan, by the step) and
an append of 5 tokens to every row, as a guide does it; planning and writing are included.

All ways of a case are timed in turn, and ratios are medians over the turns, since a shared machine
is slow at one time and fast at another. "dense" is scaled_dot_product_attention over keys and
values that already lie side by side for each row, without sharing: it leaves out writing, planning
and gathering.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from bench import reports
from w2s_fast.attention import GatheredPlan, LayerOptions, Level, RowTree
from w2s_fast.cache import PagePool

BEAMS = SUCCESSORS = 4
STEPS = 4  # decoded under one plan
APPENDED = 5  # tokens of a chunk
PAGE_SIZE = 16
DENSE_BYTES = 2**30  # no more memory for dense keys and values


@dataclass
class Shape:
    layers: int = 12
    heads: int = 12
    dim: int = 64

    @property
    def options(self) -> LayerOptions:
        return LayerOptions(self.dim**-0.5, None, None, None)


@dataclass
class Row:
    """One line of the result: milliseconds of a pass through all layers, and their ratios."""

    what: str
    prompt: int
    history: int
    requests: int
    tree_ms: float
    flat_ms: float
    dense_ms: float | None
    flat_to_tree: float
    dense_to_tree: float | None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes")
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--history", type=int, default=64, help="tokens of a hypothesis")
    parser.add_argument("--seconds", type=float, default=10, help="for each case, about")
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(arguments)
    shape = Shape()
    if args.dry_run:
        shape, args.seconds = Shape(layers=2, heads=2, dim=8), 0.0
        args.prompts, args.requests, args.history = [20], [1, 2], 17
    rows: list[Row] = []
    head = reports.facts("bench.cpu_attention", arguments) | {
        "dry_run": args.dry_run,
        "shape": asdict(shape),
    }

    def save(complete: bool) -> None:
        found = head | {"rows": [asdict(row) for row in rows]}
        reports.save(args.out, found, complete=complete)

    print(f"{'':7s} prompt requests    tree      flat     dense   flat/tree dense/tree")
    for prompt in args.prompts:
        for requests in args.requests:
            case = Case(shape, prompt, args.history, requests)
            for what, ways in (("decode", case.decode()), ("append", case.append())):
                rows.append(timed(case, what, ways, args.seconds))
                print(line(rows[-1]), flush=True)
                save(complete=False)
    save(complete=True)
    return 0


class Case:
    """Rows of some requests in a pool, as a search leaves them."""

    def __init__(self, shape: Shape, prompt: int, history: int, requests: int) -> None:
        self.shape, self.prompt, self.history, self.requests = shape, prompt, history, requests
        rows = requests * BEAMS * SUCCESSORS
        length = prompt + history + STEPS + APPENDED
        own_pages = -(-(history + STEPS + APPENDED) // PAGE_SIZE) + 2
        self.pool = PagePool(
            layers=shape.layers,
            num_kv_heads=shape.heads,
            head_dim=shape.dim,
            num_pages=requests * (prompt // PAGE_SIZE + 1) + rows * own_pages,
            page_size=PAGE_SIZE,
            max_slots=rows,
            max_tokens_per_slot=length,
            dtype=torch.float32,
            device="cpu",
        )
        self.pool.kv.normal_()
        heads = []
        for _ in range(requests):
            root = self.pool.allocate(1)
            self._grow(root, prompt)
            heads += [*root, *self.pool.fork(root, [BEAMS - 1])]
        for _ in range(history):  # in turn, so that a history's pages lie apart
            self._grow(heads, 1)
        forked = self.pool.fork(heads, [SUCCESSORS - 1] * len(heads))
        self.slots = np.concatenate(
            [[h, *c] for h, c in zip(heads, forked.reshape(len(heads), -1), strict=True)]
        )
        at = np.arange(rows)
        self.tree = RowTree.of(
            [
                Level(at // (BEAMS * SUCCESSORS), np.full(rows, prompt)),
                Level(at // SUCCESSORS, np.full(rows, prompt + history)),
            ],
            rows,
        )
        width = 2 * shape.heads * shape.dim * 4 * rows * length
        self.copies = min(shape.layers, DENSE_BYTES // width)  # of a layer's dense keys and values

    def decode(self) -> dict[str, Callable[[], None]]:
        """A chunk of ``STEPS`` steps."""
        query, key = self._tensors(1)
        dense = self._dense(1)

        def run(tree: RowTree | None) -> None:
            ones = np.ones(len(self.slots), np.int32)
            self.pool.reserve(self.slots, ones * STEPS)
            plan = GatheredPlan.make(self.pool, self.slots, ones, tree, ahead=STEPS - 1)
            for step in range(STEPS):
                if step:
                    plan.advance()
                for layer in range(self.shape.layers):
                    plan.attend(layer, query, key, key, self.shape.options)

        def steps() -> None:
            for _ in range(STEPS):
                dense()

        return {"tree": lambda: run(self.tree), "flat": lambda: run(None), "dense": steps}

    def append(self) -> dict[str, Callable[[], None]]:
        """One pass of ``APPENDED`` tokens for every row."""
        query, key = self._tensors(APPENDED)

        def run(tree: RowTree | None) -> None:
            counts = np.full(len(self.slots), APPENDED, np.int32)
            self.pool.reserve(self.slots, counts)
            plan = GatheredPlan.make(self.pool, self.slots, counts, tree)
            for layer in range(self.shape.layers):
                plan.attend(layer, query, key, key, self.shape.options)

        return {
            "tree": lambda: run(self.tree),
            "flat": lambda: run(None),
            "dense": self._dense(APPENDED),
        }

    def _grow(self, slots: Sequence[int], count: int) -> None:
        self.pool.reserve(slots, [count] * len(slots))
        self.pool.extend(slots, [count] * len(slots))

    def _tensors(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (len(self.slots) * tokens, self.shape.heads, self.shape.dim)
        return torch.randn(shape), torch.randn(shape)

    def _dense(self, tokens: int) -> Callable[[], None]:
        length = self.prompt + self.history + tokens
        shape = (len(self.slots), self.shape.heads, length, self.shape.dim)
        kv = [torch.randn(2, *shape) for _ in range(self.copies)]
        query = torch.randn(len(self.slots), self.shape.heads, tokens, self.shape.dim)
        mask = torch.zeros(tokens, length)
        mask[:, -tokens:].masked_fill_(torch.ones(tokens, tokens).triu(1) > 0, -torch.inf)

        def run() -> None:
            for layer in range(self.shape.layers):
                key, value = kv[layer % self.copies]
                torch.nn.functional.scaled_dot_product_attention(
                    query, key, value, None if tokens == 1 else mask
                )

        return run


@torch.inference_mode()
def timed(case: Case, what: str, ways: dict[str, Callable[[], None]], seconds: float) -> Row:
    """Every way in turn, at least 5 turns; the first one only warms up."""
    if case.copies == 0:
        ways = {name: way for name, way in ways.items() if name != "dense"}
    times: dict[str, list[float]] = {name: [] for name in ways}
    start = time.monotonic()
    while len(times["tree"]) < 6 or time.monotonic() - start < seconds:
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - begin)
    times = {name: of[1:] for name, of in times.items()}
    passes = STEPS if what == "decode" else 1
    ms = {name: statistics.median(of) / passes * 1e3 for name, of in times.items()}
    to_tree = {
        name: statistics.median(a / b for a, b in zip(of, times["tree"], strict=True))
        for name, of in times.items()
    }
    return Row(
        what=what,
        prompt=case.prompt,
        history=case.history,
        requests=case.requests,
        tree_ms=ms["tree"],
        flat_ms=ms["flat"],
        dense_ms=ms.get("dense"),
        flat_to_tree=to_tree["flat"],
        dense_to_tree=to_tree.get("dense"),
    )


def line(row: Row) -> str:
    """One row for a terminal."""
    dense = "       -" if row.dense_ms is None else f"{row.dense_ms:8.2f}"
    ratio = "     -" if row.dense_to_tree is None else f"{row.dense_to_tree:6.2f}"
    return (
        f"{row.what:7s} {row.prompt:6d} {row.requests:8d} {row.tree_ms:8.2f}  {row.flat_ms:8.2f}"
        f"  {dense} ms {row.flat_to_tree:6.2f}     {ratio}"
    )


if __name__ == "__main__":
    sys.exit(reports.run(main))
