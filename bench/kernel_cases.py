"""What :mod:`bench.kernels` times: every operator between hidden states and beams, in its shapes.

A case is made when its turn comes, so that only one lies in memory. Its input sets leave the L2
cache behind where there is room for so many; those of the selection are small, as they are in a
search. Attention has cases of its own, in ``attention_cases.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch

from bench.timing import DTYPES, input_sets
from w2s_fast.kernels import rms_norm, rotate
from w2s_fast.kernels.choose_beta import choose_beta
from w2s_fast.kernels.copy_pages import copy_pages
from w2s_fast.kernels.fuse_logits import fuse_logits
from w2s_fast.kernels.linear_logprob import linear_logprob
from w2s_fast.kernels.linear_logprob_partials import Partials
from w2s_fast.kernels.sample_tokens import sample_tokens
from w2s_fast.kernels.score_select import score_select
from w2s_fast.kernels.select_beams import select_beams
from w2s_fast.kernels.token_logprob import token_logprob

# "tiny": does it run? "cpu": one search with a GPT-2, in float32. "gpu": searches of large models.
Scale = Literal["tiny", "cpu", "gpu"]


@dataclass
class Work:
    """A call to be timed, over its input sets.

    Attributes:
        moved: bytes that the call must read and write.
        flop: floating-point operations of its product, in ``dtype``.
        passes: whether its time is compared with one pass over ``moved``.
        beside: other ways to come to the same, over the same input sets, by name.
    """

    call: Callable[[Any], object]
    inputs: Sequence[Any]
    moved: int = 0
    flop: int = 0
    dtype: str = ""
    passes: bool = False
    beside: dict[str, Callable[[Any], object]] = field(default_factory=dict)


class Case(NamedTuple):
    """An operator in one shape, and what is hoped for it."""

    name: str
    shape: str
    make: Callable[[], Work]
    target: str = ""


def cases(device: torch.device, scale: Scale) -> Iterator[Case]:
    """Every case but attention's; those with targets first, so that a short run still has them."""
    if scale == "cpu":
        yield from _cpu_cases(device)
        return
    tiny = scale == "tiny"
    vocab, many = (1000, 8) if tiny else (128_256, 512)
    yield _token_logprob(device, many, vocab, "bf16", "0.85 of copy")
    yield _token_logprob(device, 16, vocab, "bf16", "8 us")
    for settings, target in (
        ("no filter", "1.5 passes"),
        ("top-k 50 top-p 0.95", "3 passes"),
        ("top-p 0.95", ""),
        ("greedy", ""),
    ):
        yield _sample(device, 4 if tiny else 128, vocab, "bf16", settings, target)
    yield _select(device, 2 if tiny else 64, 16, 5, "15 us")
    yield _select(device, 1 if tiny else 8, 64, 30)
    if tiny:
        yield _score_select(device, 2, 4, 3, 97)
    else:
        yield _score_select(device, 1, 16, 5, 50_257)
        yield _score_select(device, 64, 16, 5, 50_257)
        yield _score_select(device, 8, 64, 30, vocab)
    heads = [(97, 32)] if tiny else [(50_257, 768), (128_256, 4_096), (128_256, 8_192)]
    for outputs, width in heads:
        target = "1.25 x product" if width == 768 else "1 x product + token_logprob"
        for rows in (16, 64, 128, 512):
            yield _linear(device, rows, outputs, width, "bf16", target)
    yield _fuse(device, 4 if tiny else 64, vocab, "bf16")
    yield _choose_beta(device, 4 if tiny else 64, vocab, "bf16")
    for rows, width in [(4, 32)] if tiny else [(16, 4096), (1024, 4096)]:
        yield _rms_norm(device, rows, width, "bf16")
    for rows, heads in [(4, (4, 2, 16))] if tiny else [(16, (32, 8, 128)), (1024, (32, 8, 128))]:
        yield _rotate(device, rows, *heads, "bf16")
    layers, kv_heads = (2, 2) if tiny else (48, 25)  # of gpt2-xl
    for pairs in (1, 16):
        yield _copy_pages(device, pairs, layers, kv_heads, "bf16")
    for dtype in ("fp16", "fp32"):
        yield _token_logprob(device, many, vocab, dtype)


def _cpu_cases(device: torch.device) -> Iterator[Case]:
    """As one request with W = K = 4 and chunks of 5 has them, beside GPT-2's vocabulary."""
    rows, vocab = 16, 50_257
    yield _token_logprob(device, rows, vocab, "fp32")
    for settings in ("no filter", "top-k 50"):
        yield _sample(device, rows, vocab, "fp32", settings)
    for requests in (1, 64):
        yield _select(device, requests, rows, 5)
    yield _score_select(device, 1, rows, 5, vocab)
    for tokens in (16, 80):
        yield _linear(device, tokens, vocab, 768, "fp32")
    yield _fuse(device, rows, vocab, "fp32")
    yield _choose_beta(device, 4, vocab, "fp32")
    yield _copy_pages(device, 16, 12, 12, "fp32")


def _token_logprob(
    device: torch.device, rows: int, vocab: int, dtype: str, target: str = ""
) -> Case:
    def make() -> Work:
        moved = rows * vocab * DTYPES[dtype].itemsize
        tokens = torch.randint(0, vocab, (rows,), device=device)
        inputs = [_logits(device, rows, vocab, dtype) for _ in range(input_sets(moved, 16))]
        return Work(lambda logits: token_logprob(logits, tokens), inputs, moved)

    return Case("token_logprob", f"[{rows}, {vocab}] {dtype}", make, target)


def _sample(
    device: torch.device, rows: int, vocab: int, dtype: str, settings: str, target: str = ""
) -> Case:
    def make() -> Work:
        def full(value: float, kind: torch.dtype) -> torch.Tensor:
            return torch.full((rows,), value, dtype=kind, device=device)

        own = (
            full(0.0 if settings == "greedy" else 0.7, torch.float32),
            full(50 if "top-k" in settings else 0, torch.int64),
            full(0.95 if "top-p" in settings else 1.0, torch.float64),
            full(0.0, torch.float64),
        )
        keys = [torch.arange(rows, device=device) for _ in range(3)]
        moved = rows * vocab * DTYPES[dtype].itemsize
        inputs = [_logits(device, rows, vocab, dtype) for _ in range(input_sets(moved, 8))]

        def sample(logits: torch.Tensor) -> object:
            return sample_tokens(logits, *own, *keys)

        return Work(sample, inputs, moved, passes=True)

    return Case("sample_tokens", f"[{rows}, {vocab}] {dtype} {settings}", make, target)


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


def _select(
    device: torch.device, requests: int, candidates: int, length: int, target: str = ""
) -> Case:
    def make() -> Work:
        columns = _Columns.make(device, requests, candidates, length)
        tokens = len(columns.tokens)
        inputs = [-torch.rand(2, 1, tokens, device=device) for _ in range(input_sets(8 * tokens))]

        def select(logprobs: torch.Tensor) -> object:
            return select_beams(*logprobs, *columns, candidates, 4)

        return Work(select, inputs)

    shape = f"{requests} requests x {candidates} candidates x {length} tokens"
    return Case("select_beams", shape, make, target)


def _score_select(
    device: torch.device, requests: int, candidates: int, length: int, vocab: int
) -> Case:
    """From the partials of both models on, beside the merges and select_beams one by one."""
    splits = -(-vocab // 128)

    def make() -> Work:
        columns = _Columns.make(device, requests, candidates, length)
        count = len(columns.tokens)
        stops = torch.arange(requests, device=device)
        cu_stops = torch.arange(requests + 1, device=device)
        logprobs = -torch.rand(count, device=device)

        def partials() -> Partials:
            return Partials(
                torch.randn(count, splits, device=device),
                torch.rand(count, splits, device=device) + 1,
                torch.randn(count, device=device),
            )

        def fused(models: tuple[Partials, Partials]) -> object:
            return score_select(
                [models], columns.weights, columns.tokens, logprobs, *columns[2:8], stops,
                cu_stops, *columns[8:], candidates, 4,
            )  # fmt: skip

        def apart(models: tuple[Partials, Partials]) -> object:
            both = (model.logprobs()[None] for model in models)
            return select_beams(*both, *columns, candidates, 4)

        moved = 2 * count * (2 * splits + 1) * 4
        inputs = [(partials(), partials()) for _ in range(input_sets(moved, 16))]
        return Work(fused, inputs, beside={"to merges + select_beams": apart})

    shape = f"{requests} requests x {candidates} x {length} tokens, {splits} splits"
    return Case("score_select", shape, make)


def _linear(
    device: torch.device, rows: int, vocab: int, width: int, dtype: str, target: str = ""
) -> Case:
    def make() -> Work:
        kind = DTYPES[dtype]
        tokens = torch.randint(0, vocab, (rows,), device=device)
        moved = (vocab + rows) * width * kind.itemsize
        inputs = []
        for _ in range(input_sets(moved, 16)):
            hidden = torch.randn(rows, width, device=device).to(kind)
            inputs.append((hidden, torch.randn(vocab, width, device=device).to(kind)))
            inputs[-1][1].mul_(width**-0.5)

        def product(given: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            return torch.nn.functional.linear(*given)

        return Work(
            lambda given: linear_logprob(*given, tokens),
            inputs,
            moved,
            flop=2 * rows * vocab * width,
            dtype=dtype,
            beside={
                "to product": product,
                "to product + token_logprob": lambda given: token_logprob(product(given), tokens),
            },
        )

    return Case("linear_logprob", f"N {rows}, V {vocab}, D {width} {dtype}", make, target)


def _fuse(device: torch.device, rows: int, vocab: int, dtype: str) -> Case:
    def make() -> Work:
        beta = torch.ones(1, rows, device=device)
        moved = rows * vocab * (3 * DTYPES[dtype].itemsize + 4)  # three reads, one fp32 write
        inputs = _threes(device, rows, vocab, dtype, moved)
        return Work(lambda logits: fuse_logits(*logits, beta), inputs, moved)

    return Case("fuse_logits", f"[{rows}, {vocab}] {dtype}", make)


def _choose_beta(device: torch.device, rows: int, vocab: int, dtype: str) -> Case:
    def make() -> Work:
        moved = rows * vocab * 3 * DTYPES[dtype].itemsize
        inputs = _threes(device, rows, vocab, dtype, moved)
        return Work(lambda logits: choose_beta(*logits), inputs, moved)

    return Case("choose_beta", f"[{rows}, {vocab}] {dtype}", make)


def _rms_norm(device: torch.device, rows: int, width: int, dtype: str) -> Case:
    """Beside the operators that transformers has in its place."""

    def make() -> Work:
        moved = 2 * rows * width * DTYPES[dtype].itemsize
        weight = torch.randn(width, device=device).to(DTYPES[dtype])
        count = input_sets(moved)
        inputs = list(torch.randn(count, rows, width, device=device).to(DTYPES[dtype]))
        return Work(
            lambda x: rms_norm.rms_norm(x, weight, 1e-6), inputs, moved,
            beside={"to torch": lambda x: rms_norm._torch(x, weight, 1e-6, False)},
        )  # fmt: skip

    return Case("rms_norm", f"[{rows}, {width}] {dtype}", make)


def _rotate(
    device: torch.device, rows: int, heads: int, kv_heads: int, dim: int, dtype: str
) -> Case:
    """Beside the operators that transformers has in its place."""

    def make() -> Work:
        moved = 2 * rows * (heads + kv_heads) * dim * DTYPES[dtype].itemsize
        shape = (input_sets(moved), 1, rows, heads + kv_heads, dim)
        both = torch.randn(shape, device=device).to(DTYPES[dtype]).transpose(2, 3)
        cos, sin = torch.rand(2, 1, rows, dim, device=device).to(DTYPES[dtype])
        inputs = [one.split([heads, kv_heads], 1) for one in both]
        return Work(
            lambda x: rotate.rotate(*x, cos, sin), inputs, moved,
            beside={"to torch": lambda x: rotate._torch(*x, cos, sin)},
        )  # fmt: skip

    return Case("rotate", f"{rows} x {heads} + {kv_heads} heads of {dim} {dtype}", make)


def _copy_pages(device: torch.device, count: int, layers: int, heads: int, dtype: str) -> Case:
    """What a round's forks copy, in all layers: pages of 16 tokens."""

    def make() -> Work:
        kind = DTYPES[dtype]
        moved = 2 * count * layers * 2 * 16 * heads * 64 * kind.itemsize  # read, and written
        sets = input_sets(moved, 16)
        # Copies of zeros take as long as any, and pages never written might be one and the same.
        kv = torch.zeros(layers, 2, 2 * count * sets, 16, heads, 64, dtype=kind, device=device)
        order = torch.arange(2 * count, dtype=torch.int32, device=device).view(2, count).T
        inputs = [(order + 2 * count * i).contiguous() for i in range(sets)]
        return Work(lambda pairs: copy_pages(kv, pairs), inputs, moved)

    shape = f"{count} pages of 16 x {heads} x 64, {layers} layers, {dtype}"
    return Case("copy_pages", shape, make)


def _threes(
    device: torch.device, rows: int, vocab: int, dtype: str, moved: int
) -> list[tuple[torch.Tensor, ...]]:
    """Logits of a base, and of the tuned and untuned model of one guide."""

    def three() -> tuple[torch.Tensor, ...]:
        base, tuned, untuned = (_logits(device, rows, vocab, dtype) for _ in range(3))
        return base, tuned[None], untuned[None]

    return [three() for _ in range(input_sets(moved, 8))]


def _logits(device: torch.device, rows: int, vocab: int, dtype: str) -> torch.Tensor:
    return (torch.randn(rows, vocab, device=device) * 3).to(DTYPES[dtype])
