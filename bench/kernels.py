"""Time of every operator between hidden states and beams, against what the machine can do.

    python -m bench.kernels --out bench/results/kernels.json       on a GPU
    python -m bench.kernels --dry-run --out dry.json               tiny shapes, any machine

Each row gives the median time, GB/s or TFLOP/s, and the share of the copy bandwidth or matmul rate
measured in the same run; or the ratio to a baseline timed in the same run. A case that fails is
reported as such, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.timing import (
    commit,
    copy_bandwidth,
    graph_seconds,
    input_sets,
    matmul_rate,
    median_seconds,
)
from w2s_fast.attention import KernelPlan, Level, RowTree
from w2s_fast.cache import Int32Array, PagePool
from w2s_fast.kernels.choose_beta import choose_beta
from w2s_fast.kernels.copy_pages import copy_pages
from w2s_fast.kernels.fuse_logits import fuse_logits
from w2s_fast.kernels.library import BACKEND, HAS_TRITON, triton
from w2s_fast.kernels.linear_logprob import linear_logprob
from w2s_fast.kernels.linear_logprob_partials import Partials
from w2s_fast.kernels.paged_attention import paged_attention
from w2s_fast.kernels.sample_tokens import sample_tokens
from w2s_fast.kernels.score_select import score_select
from w2s_fast.kernels.select_beams import select_beams
from w2s_fast.kernels.token_logprob import token_logprob

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass
class Machine:
    """Where it runs, and its limits as measured there."""

    device: torch.device
    copy: float  # bytes read and written, a second
    matmul: dict[str, float]  # operations a second, by dtype
    dry: bool


@dataclass
class Row:
    """One line of the result. Times in microseconds."""

    name: str
    shape: str
    us: float | None = None
    gb_per_s: float | None = None
    share_of_copy: float | None = None
    tflop_per_s: float | None = None
    share_of_matmul: float | None = None
    ratios: dict[str, float] = field(default_factory=dict)
    target: str = ""
    error: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on the CPU if need be")
    parser.add_argument("--seconds", type=float, default=180, help="start no case after this long")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.dry_run:
        parser.error("no GPU here; --dry-run runs tiny shapes on the CPU")
    size, square = (2**20, 128) if args.dry_run else (2**30, 8192)
    machine = Machine(
        device,
        copy_bandwidth(device, size),
        {name: matmul_rate(device, dtype, square) for name, dtype in DTYPES.items()},
        args.dry_run,
    )
    rows, start = [], time.monotonic()
    for name, case in cases(machine):
        if time.monotonic() - start > args.seconds:
            rows.append(Row(name, "", error="not run: time was up"))
            continue
        try:
            rows += case()
        except Exception as error:
            traceback.print_exc()
            rows.append(Row(name, "", error=f"{type(error).__name__}: {error}"[:300]))
        print(line(rows[-1]), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report(machine, rows), indent=1) + "\n")
    return 1 if any(row.error for row in rows) else 0


def cases(machine: Machine) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
    """Every case; targets first, so that a short run still has them."""
    big = 1000 if machine.dry else 128_256
    many = 8 if machine.dry else 512
    yield "token_logprob", lambda: [_token_logprob(machine, many, big, "bf16", "0.85 of copy")]
    yield "token_logprob", lambda: [_token_logprob(machine, 16, big, "bf16", "0.60 of copy")]
    for settings, target in (
        ("no filter", "1.5 passes"),
        ("top-k 50 top-p 0.95", "3 passes"),
        ("top-p 0.95", ""),
        ("greedy", ""),
    ):
        rows = 4 if machine.dry else 128
        yield "sample_tokens", _bound(_sample, machine, rows, big, settings, target)
    yield "select_beams", lambda: [_select(machine, 64, 16, 5, "15 us")]
    yield "select_beams", lambda: [_select(machine, 8, 64, 30, "")]
    for requests, candidates, length, vocab in (
        [(2, 4, 3, 97)]
        if machine.dry
        else [(1, 16, 5, 50_257), (64, 16, 5, 50_257), (8, 64, 30, big)]
    ):
        yield "score_select", _bound(_score_select, machine, requests, candidates, length, vocab)
    heads = [(97, 32)] if machine.dry else [(50_257, 768), (128_256, 4_096), (128_256, 8_192)]
    for vocab, width in heads:
        for rows in (16, 64, 128, 512):
            yield "linear_logprob", _bound(_linear, machine, rows, vocab, width, "bf16")
    yield "fuse_logits", lambda: [_fuse(machine, 4 if machine.dry else 64, big)]
    yield "choose_beta", lambda: [_choose_beta(machine, 4 if machine.dry else 64, big)]
    for pairs in (1, 16):
        yield "copy_pages", _bound(_copy_pages, machine, pairs)
    # Rows of W = K = 4: (requests, prompt, history, new tokens).
    for requests, prompt, history, new in (
        [(2, 40, 20, 1), (1, 40, 20, 3)]
        if machine.dry
        else [(1, 4096, 64, 1), (64, 512, 64, 1), (1, 4096, 64, 5), (64, 512, 64, 5)]
    ):
        for shares in (True, False):
            yield (
                "paged_attention",
                _bound(_attention, machine, requests, prompt, history, new, shares),
            )
    yield "paged_attention", _bound(_append, machine, *((40, 20) if machine.dry else (512, 64)))
    for dtype in ("fp16", "fp32"):
        yield "token_logprob", _bound(_token_logprob, machine, many, big, dtype, "")


def _bound(case: Callable[..., Row], *args: Any) -> Callable[[], list[Row]]:
    return lambda: [case(*args)]


def _token_logprob(machine: Machine, rows: int, vocab: int, dtype: str, target: str) -> Row:
    moved = rows * vocab * DTYPES[dtype].itemsize
    tokens = torch.randint(0, vocab, (rows,), device=machine.device)
    inputs = [_logits(machine, rows, vocab, dtype) for _ in range(input_sets(moved, 16))]
    seconds = median_seconds(lambda logits: token_logprob(logits, tokens), inputs)
    return _bytes_row(
        machine, "token_logprob", f"[{rows}, {vocab}] {dtype}", seconds, moved, target
    )


def _sample(machine: Machine, rows: int, vocab: int, settings: str, target: str) -> Row:
    moved = rows * vocab * 2
    keys = [torch.arange(rows, device=machine.device) for _ in range(3)]
    top_k = 50 if "top-k" in settings else 0
    top_p = 0.95 if "top-p" in settings else 1.0

    def full(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((rows,), value, dtype=dtype, device=machine.device)

    own = (
        full(0.0 if settings == "greedy" else 0.7, torch.float32),
        full(top_k, torch.int64),
        full(top_p, torch.float64),
        full(0.0, torch.float64),
    )
    inputs = [_logits(machine, rows, vocab, "bf16") for _ in range(input_sets(moved, 8))]
    seconds = median_seconds(lambda logits: sample_tokens(logits, *own, *keys), inputs)
    row = _bytes_row(
        machine, "sample_tokens", f"[{rows}, {vocab}] {settings}", seconds, moved, target
    )
    # A pass reads the logits once at the copy bandwidth, which counts reads and writes.
    row.ratios["passes"] = seconds / (moved / machine.copy)
    return row


class _Columns(NamedTuple):
    """What select_beams is told of equal rounds, in its order from ``weights`` on."""

    weights: torch.Tensor
    tokens: torch.Tensor
    cu_tokens: torch.Tensor
    previous: torch.Tensor
    lengths: torch.Tensor
    parents: torch.Tensor
    siblings: torch.Tensor
    cu_candidates: torch.Tensor
    width: torch.Tensor
    mean: torch.Tensor
    dedup: torch.Tensor

    @classmethod
    def make(cls, device: torch.device, requests: int, candidates: int, length: int) -> _Columns:
        count = requests * candidates
        tokens = count * length
        return cls(
            torch.ones(1, dtype=torch.float64, device=device),
            torch.randint(0, 50_000, (tokens,), device=device),
            torch.arange(0, tokens + 1, length, device=device),
            torch.zeros(count, dtype=torch.float64, device=device),
            torch.full((count,), length, device=device),
            torch.zeros(count, dtype=torch.int32, device=device),
            torch.arange(count, device=device) % candidates // 4,
            torch.arange(0, count + 1, candidates, device=device),
            torch.full((requests,), 4, device=device),
            torch.zeros(requests, dtype=torch.bool, device=device),
            torch.ones(requests, dtype=torch.bool, device=device),
        )


def _select(machine: Machine, requests: int, candidates: int, length: int, target: str) -> Row:
    columns = _Columns.make(machine.device, requests, candidates, length)
    tuned, untuned = -torch.rand(2, 1, len(columns.tokens), device=machine.device)
    # Inside a graph, as in an engine: a launch from Python takes longer than the kernel.
    seconds = graph_seconds(lambda _: select_beams(tuned, untuned, *columns, candidates, 4), None)
    shape = f"{requests} requests x {candidates} candidates x {length} tokens"
    return Row("select_beams", shape, us=seconds * 1e6, target=target)


def _score_select(machine: Machine, requests: int, candidates: int, length: int, vocab: int) -> Row:
    """From the partials of both models on, beside the merges and select_beams one by one."""
    device = machine.device
    columns = _Columns.make(device, requests, candidates, length)
    count, splits = len(columns.tokens), -(-vocab // 128)
    tuned, untuned = (
        Partials(
            torch.randn(count, splits, device=device),
            torch.rand(count, splits, device=device) + 1,
            torch.randn(count, device=device),
        )
        for _ in range(2)
    )
    stops = torch.arange(requests, device=device)
    cu_stops = torch.arange(requests + 1, device=device)
    logprobs = -torch.rand(count, device=device)

    def fused(_: None) -> torch.Tensor:
        return score_select(
            [(tuned, untuned)], columns.weights, columns.tokens, logprobs, *columns[2:8], stops,
            cu_stops, *columns[8:], candidates, 4,
        )  # fmt: skip

    def apart(_: None) -> object:
        both = tuned.logprobs()[None], untuned.logprobs()[None]
        return select_beams(*both, *columns, candidates, 4)

    seconds = graph_seconds(fused, None)
    shape = f"{requests} requests x {candidates} x {length} tokens, {splits} splits"
    ratios = {"to merges + select_beams": seconds / graph_seconds(apart, None)}
    return Row("score_select", shape, us=seconds * 1e6, ratios=ratios)


def _linear(machine: Machine, rows: int, vocab: int, width: int, dtype: str) -> Row:
    kind = DTYPES[dtype]
    weight = (torch.randn(vocab, width, device=machine.device) * width**-0.5).to(kind)
    tokens = torch.randint(0, vocab, (rows,), device=machine.device)
    inputs = [torch.randn(rows, width, device=machine.device).to(kind) for _ in range(4)]
    ours = median_seconds(lambda hidden: linear_logprob(hidden, weight, tokens), inputs)
    product = median_seconds(lambda hidden: torch.nn.functional.linear(hidden, weight), inputs)
    both = median_seconds(
        lambda hidden: token_logprob(torch.nn.functional.linear(hidden, weight), tokens), inputs
    )
    flop = 2 * rows * vocab * width
    moved = (vocab + rows) * width * kind.itemsize
    target = "1.25 x product" if width == 768 else "1 x product + token_logprob"
    row = _bytes_row(
        machine, "linear_logprob", f"N {rows}, V {vocab}, D {width} {dtype}", ours, moved, target
    )
    row.tflop_per_s = flop / ours / 1e12
    row.share_of_matmul = flop / ours / machine.matmul[dtype]
    row.ratios = {"to product": ours / product, "to product + token_logprob": ours / both}
    return row


def _fuse(machine: Machine, rows: int, vocab: int) -> Row:
    base, tuned, untuned = _three(machine, rows, vocab)
    beta = torch.ones(1, rows, device=machine.device)
    seconds = median_seconds(lambda _: fuse_logits(base, tuned, untuned, beta), [None])
    moved = rows * vocab * (3 * 2 + 4)  # three bf16 reads, one fp32 write
    return _bytes_row(machine, "fuse_logits", f"[{rows}, {vocab}] bf16", seconds, moved, "")


def _choose_beta(machine: Machine, rows: int, vocab: int) -> Row:
    base, tuned, untuned = _three(machine, rows, vocab)
    seconds = median_seconds(lambda _: choose_beta(base, tuned, untuned), [None])
    return _bytes_row(
        machine, "choose_beta", f"[{rows}, {vocab}] bf16", seconds, rows * vocab * 3 * 2, ""
    )


def _copy_pages(machine: Machine, count: int) -> Row:
    """What a round's forks copy: pages of gpt2-xl, 16 tokens each, in all its layers."""
    layers, heads = (2, 2) if machine.dry else (48, 25)
    pages = 4 * count
    # Copies of zeros take as long as any, and pages never written might be one and the same.
    kv = torch.zeros(layers, 2, pages, 16, heads, 64, dtype=torch.bfloat16, device=machine.device)
    moved = 2 * count * kv[:, :, 0].numel() * kv.element_size()  # read, and written
    order = torch.arange(2 * count, dtype=torch.int32, device=machine.device).view(2, count).T
    inputs = [(order + start).contiguous() for start in (0, 2 * count)]
    seconds = median_seconds(lambda pairs: copy_pages(kv, pairs), inputs)
    shape = f"{count} pages of 16 x {heads} x 64, {layers} layers, bf16"
    return _bytes_row(machine, "copy_pages", shape, seconds, moved, "")


def _three(machine: Machine, rows: int, vocab: int) -> tuple[torch.Tensor, ...]:
    return (
        _logits(machine, rows, vocab, "bf16"),
        _logits(machine, rows, vocab, "bf16")[None],
        _logits(machine, rows, vocab, "bf16")[None],
    )


def _logits(machine: Machine, rows: int, vocab: int, dtype: str) -> torch.Tensor:
    return (torch.randn(rows, vocab, device=machine.device) * 3).to(DTYPES[dtype])


class _Search(NamedTuple):
    """Rows of W = K = 4 in a pool of the 8B's shape, and what they share."""

    pool: PagePool
    slots: Int32Array
    tree: RowTree
    moved: int  # bytes of distinct keys and values in a layer

    def plan(self, new: int, shares: bool) -> KernelPlan:
        counts = np.full(len(self.slots), new, np.int32)
        return KernelPlan.make(self.pool, self.slots, counts, self.tree if shares else None)


_HEADS, _KV_HEADS, _HEAD_DIM = 32, 8, 128


def _search(machine: Machine, requests: int, prompt: int, history: int, new: int) -> _Search:
    """A chunk begins: no row has tokens of its own but the new ones. Layers leave the L2 behind."""
    size, rows = 16, 16 * requests
    kv_heads, dim = (2, 16) if machine.dry else (_KV_HEADS, _HEAD_DIM)
    tokens = requests * (prompt + 4 * history + 16 * new)
    moved = tokens * 2 * kv_heads * dim * 2
    pages = requests * (prompt // size + 4 * (history // size) + 16 * (new // size) + 64)
    longest = prompt + history + new
    pool = PagePool(
        input_sets(moved, 16), kv_heads, dim, pages, size, 2 * rows, longest, torch.bfloat16,
        machine.device,
    )  # fmt: skip
    pool.kv.normal_()
    slots = pool.allocate(requests)
    for length in (prompt, history):
        pool.reserve(slots, [length] * len(slots))
        pool.extend(slots, [length] * len(slots))
        children = pool.fork(slots, [4] * len(slots))
        pool.release(slots)
        slots = children
    pool.reserve(slots, [new] * rows)
    row = np.arange(rows)
    levels = [
        Level(row // 16, np.full(rows, prompt)),
        Level(row // 4, np.full(rows, prompt + history)),
    ]
    return _Search(pool, slots, RowTree.of(levels, rows), moved)


def _queries(machine: Machine, tokens: int) -> torch.Tensor:
    heads, dim = (4, 16) if machine.dry else (_HEADS, _HEAD_DIM)
    return torch.randn(tokens, heads, dim, device=machine.device).bfloat16()


def _attend(plan: KernelPlan, layer: int, q: torch.Tensor) -> torch.Tensor:
    return paged_attention(
        q, plan.pool.kv[layer], plan.page_table, plan.lengths, plan.cu_seqlens_q,
        scale=q.shape[2] ** -0.5, max_q=plan.max_q, max_k=plan.max_k,
        max_own=plan.max_own, shared=plan.shared, table_start=plan.table_start,
    )  # fmt: skip


def _attention(
    machine: Machine, requests: int, prompt: int, history: int, new: int, shares: bool
) -> Row:
    search = _search(machine, requests, prompt, history, new)
    plan = search.plan(new, shares)
    q, layers = _queries(machine, len(search.slots) * new), len(search.pool.kv)

    def all_layers(_: None) -> None:
        for layer in range(layers):
            _attend(plan, layer, q)

    seconds = graph_seconds(all_layers, None) / layers
    shape = f"{requests} x 16 rows of {new}, prompt {prompt}, {'shared' if shares else 'plain'}"
    return _bytes_row(machine, "paged_attention", shape, seconds, search.moved, "")


def _append(machine: Machine, prompt: int, history: int) -> Row:
    """480 tokens of 16 rows against SDPA, whose keys and values have been gathered before."""
    new = 3 if machine.dry else 30
    search = _search(machine, 1, prompt, history, new)
    plan, pool = search.plan(new, True), search.pool
    q = _queries(machine, 16 * new)
    page = pool.page_table(search.slots).long()
    dense = [kv[:, page].flatten(2, 3)[:, :, : plan.max_k].transpose(2, 3) for kv in pool.kv]
    rows = q.unflatten(0, (16, new)).transpose(1, 2)
    position = torch.arange(plan.max_k, device=machine.device)
    seen = position <= position[-new:, None]

    def sdpa(kv: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            rows, kv[0], kv[1], attn_mask=seen, enable_gqa=True
        )

    expected = sdpa(dense[0]).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(_attend(plan, 0, q), expected, atol=2e-2, rtol=2e-2)

    def ours(_: None) -> None:
        for layer in range(len(pool.kv)):
            _attend(plan, layer, q)

    def theirs(_: None) -> None:
        for kv in dense:
            sdpa(kv)

    seconds = graph_seconds(ours, None) / len(dense)
    row = _bytes_row(
        machine, "paged_attention", f"append {16 * new} tokens, prompt {prompt}", seconds,
        search.moved, "",
    )  # fmt: skip
    row.ratios["to SDPA on gathered keys"] = seconds * len(dense) / graph_seconds(theirs, None)
    return row


def _bytes_row(
    machine: Machine, name: str, shape: str, seconds: float, moved: int, target: str
) -> Row:
    rate = moved / seconds
    return Row(
        name, shape, us=seconds * 1e6, gb_per_s=rate / 1e9, share_of_copy=rate / machine.copy,
        target=target,
    )  # fmt: skip


def line(row: Row) -> str:
    """One row for a terminal."""
    if row.error:
        return f"{row.name:15s} {row.shape:40s} FAILED {row.error}"
    parts = [f"{row.us:9.1f} us"]
    if row.share_of_copy is not None:
        parts.append(f"{row.gb_per_s:7.0f} GB/s = {row.share_of_copy:.2f} of copy")
    if row.share_of_matmul is not None:
        parts.append(f"{row.tflop_per_s:5.0f} TFLOP/s = {row.share_of_matmul:.2f} of matmul")
    parts += [f"{value:.2f} {name}" for name, value in row.ratios.items()]
    if row.target:
        parts.append(f"(target {row.target})")
    return f"{row.name:15s} {row.shape:40s} " + ", ".join(parts)


def report(machine: Machine, rows: list[Row]) -> dict[str, Any]:
    """Everything a reader needs to trust a number, or not."""
    cuda = machine.device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "machine": platform.machine(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "command": " ".join(["python -m bench.kernels", *sys.argv[1:]]),
        "dry_run": machine.dry,
        "backend": BACKEND,
        "torch": torch.__version__,
        "triton": triton.__version__ if HAS_TRITON else None,
        "copy_gb_per_s": machine.copy / 1e9,
        "matmul_tflop_per_s": {name: rate / 1e12 for name, rate in machine.matmul.items()},
        "rows": [asdict(row) for row in rows],
    }


if __name__ == "__main__":
    sys.exit(main())
