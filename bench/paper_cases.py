"""Every kernel at the shapes of a search: what it moves, multiplies, and waits for.

One function an operator: its launch on meta tensors, the bytes and operations that the result takes
at least, and what each kernel's launch does. Rows are those of W = K = 4: 16 of a request. Products
that are left to torch, wide and of many rows, have no kernel of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bench.aot import SMS, Compilation, built, compilations
from bench.paper_estimate import Programs, Work
from w2s_fast.attention import SPLIT_KEYS, Bounds, Bucket
from w2s_fast.kernels import (
    choose_beta,
    fuse_logits,
    linear_logprob,
    paged_attention,
    paged_attention_triton,
    rms_norm,
    rotate,
    sample_tokens_triton,
    score_select,
    select_beams,
    token_logprob,
    write_kv,
)
from w2s_fast.kernels.copy_pages import library_path
from w2s_fast.kernels.library import Gpu
from w2s_fast.kernels.logsumexp import MERGE_BLOCK
from w2s_fast.kernels.select_beams_triton import launch_options

_ROWS = 16  # of a request
_HALF = 2  # bytes of an element
_GPT2, _LLAMA, _MISTRAL = 50_257, 128_256, 32_768  # ids of their vocabularies
_PADDED = 50_304  # where logits of GPT-2 have rows of so many, as those of a padded head
_WIDTH = 4


@dataclass(frozen=True)
class Case:
    """An operator at one shape.

    Attributes:
        compiled: its launches for an architecture.
        moved: bytes that it has to read and write at least. flop: operations of products.
        kernels: by its name, what the launch of each kernel does.
    """

    operator: str
    shape: str
    compiled: Callable[[int], list[Compilation]]
    moved: int
    kernels: dict[str, Callable[[Compilation], Work]]
    flop: int = 0


class _Model(NamedTuple):
    """Heads of queries and of keys, and their size."""

    name: str
    heads: int
    kv_heads: int
    dim: int


_SMALL, _XL = _Model("gpt2", 12, 12, 64), _Model("gpt2-xl", 25, 25, 64)
_8B = _Model("8B", 32, 8, 128)


def cases() -> Iterator[Case]:
    for rows, vocab, pitch in (
        (512, _LLAMA, _LLAMA), (16, _LLAMA, _LLAMA), (480, _MISTRAL, _MISTRAL),
        (512, _GPT2, _GPT2), (512, _GPT2, _PADDED), (16, _GPT2, _PADDED),
    ):  # fmt: skip
        yield _token_logprob(rows, vocab, pitch)
    for rows, vocab, width in (
        (80, _GPT2, 768), (512, _GPT2, 768), (5120, _GPT2, 768), (16, _LLAMA, 4096),
    ):  # fmt: skip
        yield _linear_logprob(rows, vocab, width)
    yield _sample(16, _GPT2, _GPT2, filters=True)
    yield _sample(16, _GPT2, _PADDED, filters=True)
    yield _sample(1024, _GPT2, _PADDED, filters=True)
    yield _sample(128, _LLAMA, _LLAMA, filters=True)
    yield _sample(128, _LLAMA, _LLAMA, filters=False)
    for requests, candidates, length in ((64, 16, 5), (8, 64, 30)):
        yield _select_beams(requests, candidates, length)
    for requests, candidates, length, vocab in (
        (1, 16, 5, _GPT2), (64, 16, 5, _GPT2), (8, 64, 30, _LLAMA),
    ):  # fmt: skip
        yield _score_select(requests, candidates, length, -(-vocab // 128))
    for model, requests, prompt, new in (
        (_8B, 1, 512, 1), (_8B, 1, 4096, 1), (_8B, 64, 512, 1), (_XL, 1, 512, 1),
        (_XL, 64, 512, 1), (_XL, 64, 1024, 1), (_SMALL, 64, 512, 5), (_8B, 1, 512, 30),
    ):  # fmt: skip
        yield _paged_attention(model, requests, prompt, 64, new)
    yield _write_kv(_8B, 16)
    yield _rms_norm(16, 4096)
    yield _rms_norm(1024, 4096)
    yield _rotate(_8B, 16)
    yield _rotate(_8B, 1024)
    if library_path() is not None:  # not where the package was built without nvcc
        yield _copy_pages(_XL, 48, 1)
        yield _copy_pages(_XL, 48, 16)
    yield _fuse_logits(64, _LLAMA)
    yield _choose_beta(64, _LLAMA)


def _launched(launcher: Callable[[], object]) -> Callable[[int], list[Compilation]]:
    """What a launcher of Triton kernels, called on meta tensors, launches."""
    return lambda arch: compilations(arch, launcher)


def _on(c: Compilation) -> Gpu:
    return Gpu(c.arch, SMS[c.arch])


def _meta(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _half(*shape: int) -> Tensor:
    return _meta(*shape, dtype=torch.bfloat16)


def _shape(rows: int, vocab: int, pitch: int) -> str:
    return f"[{rows}, {vocab:,}]" + (f" of {pitch:,}" if pitch > vocab else "")


def _token_logprob(rows: int, vocab: int, pitch: int) -> Case:
    logits = _half(rows, pitch)[:, :vocab]
    moved = rows * vocab * _HALF
    table = token_logprob._launch(pitch % 16 == 0, softcap=False)
    tiles = -(-vocab // (table.depth * table.lanes * table.vector))

    def split(c: Compilation) -> Work:
        return Work(moved, [Programs(waits=2 + -(-rows * tiles // c.programs), exchanges=2)])

    def merge(c: Compilation) -> Work:
        return Work(rows * tiles * 8, [Programs(waits=2, exchanges=2)])

    return Case(
        "token_logprob",
        _shape(rows, vocab, pitch),
        _launched(lambda: token_logprob._triton(logits, _meta(rows), None, 1.0, None)),
        moved,
        {"_split_rows": split, "_merge_parts": merge},
    )


def _linear_logprob(rows: int, vocab: int, width: int) -> Case:
    moved, flop = (vocab + rows) * width * _HALF, 2 * rows * vocab * width

    def split(c: Compilation) -> Work:
        depth = linear_logprob._launch(_on(c), rows, _HALF).depth
        return Work(moved, [Programs(waits=2, trips=-(-width // depth), exchanges=2)], flop)

    def merge(c: Compilation) -> Work:
        splits = -(-vocab // 128)
        blocks = -(-splits // MERGE_BLOCK)
        return Work(rows * splits * 8, [Programs(waits=1 + blocks, exchanges=0)])

    return Case(
        "linear_logprob",
        f"N {rows}, V {vocab:,}, D {width}",
        _launched(
            lambda: linear_logprob._triton(
                _half(rows, width), _half(vocab, width), _meta(rows), None, None, 1.0, None
            )
        ),
        moved,
        {"_split_vocabulary": split, "_merge_splits": merge},
        flop,
    )


def _sample(rows: int, vocab: int, pitch: int, filters: bool) -> Case:
    """With filters, top-k 50 and top-p; without, every token may be drawn."""
    moved = rows * vocab * _HALF
    groups = -(-vocab // sample_tokens_triton.tiling_for(vocab).group)

    def launch() -> None:
        single, double = _meta(rows, dtype=torch.float32), _meta(rows, dtype=torch.float64)
        sample_tokens_triton.launch(
            _half(rows, pitch)[:, :vocab], single, _meta(rows), double, double, *(_meta(rows),) * 3
        )

    def block_weights(c: Compilation) -> Work:
        return Work(0 if filters else moved, [Programs(waits=1 if filters else 3, exchanges=3)])

    def draw(c: Compilation) -> Work:
        # Bisection: some 16 steps to a bound, 31 each to the k-th logit and to the nucleus.
        chain = Programs(waits=10, exchanges=80) if filters else Programs(waits=5, exchanges=6)
        return Work(rows * groups * 4, [chain])

    return Case(
        "sample_tokens",
        f"{_shape(rows, vocab, pitch)} {'top-k 50, top-p' if filters else 'no filter'}",
        _launched(launch),
        moved,
        {
            "summarise": lambda c: Work(moved, [Programs(waits=1, exchanges=2)]),
            "block_weights": block_weights,
            "draw": draw,
            "search": lambda c: Work(rows * 8, [Programs(waits=1)]),  # no row is left
        },
    )


def _waits_of_round(candidates: int, length: int) -> int:
    """Of a program that ranks a round: settings, tokens, sums, twins, ranks."""
    options = launch_options(candidates, _WIDTH)
    blocks = -(-candidates // options["OTHERS"])
    return 7 + 3 * -(-length // options["TOKENS"]) + length + 2 * blocks


def _select_beams(requests: int, candidates: int, length: int) -> Case:
    count, double, single = requests * candidates, torch.float64, torch.float32
    tokens = count * length
    moved = tokens * (2 * 4 + 8 + 8) + count * 56

    def launch() -> None:
        logprobs, flags = _meta(1, tokens, dtype=single), _meta(requests).bool()
        select_beams._triton(
            logprobs, logprobs, _meta(1, dtype=double), _meta(tokens), _meta(count + 1),
            _meta(count, dtype=double), _meta(count), _meta(count, dtype=torch.int32), _meta(count),
            _meta(requests + 1), _meta(requests), flags, flags, candidates, _WIDTH,
        )  # fmt: skip

    waits = _waits_of_round(candidates, length)
    return Case(
        "select_beams",
        f"{requests} x {candidates} x {length}",
        _launched(launch),
        moved,
        {"one_round": lambda c: Work(moved, [Programs(waits=waits, exchanges=4)])},
    )


def _score_select(requests: int, candidates: int, length: int, splits: int) -> Case:
    """One guide, whose heads are of so many splits."""
    count, double, single = requests * candidates, torch.float64, torch.float32
    tokens = count * length
    merged, ranked = tokens * (2 * (8 * splits + 4) + 8), tokens * (8 + 8 + 4) + count * 80

    def launch() -> None:
        flags, partials = _meta(requests).bool(), [_meta(tokens, splits, dtype=single)] * 2
        score_select._triton(
            _meta(tokens), partials, partials, [_meta(tokens, dtype=single)] * 2,
            _meta(1, dtype=double), _meta(tokens, dtype=single), _meta(count + 1),
            _meta(count, dtype=double), _meta(count), _meta(count, dtype=torch.int32), _meta(count),
            _meta(requests + 1), _meta(requests), _meta(requests + 1), _meta(requests), flags,
            flags, candidates, _WIDTH,
        )  # fmt: skip

    waits = _waits_of_round(candidates, length) + 2 * -(-length // 16) + 2
    blocks = -(-splits // MERGE_BLOCK)
    return Case(
        "score_select",
        f"{requests} x {candidates} x {length}, {splits} splits",
        _launched(launch),
        merged + ranked,
        {
            "add_guide": lambda c: Work(merged, [Programs(waits=2 * blocks + 2)]),
            "choose_round": lambda c: Work(ranked, [Programs(waits=waits, exchanges=4)]),
        },
    )


def _paged_attention(model: _Model, requests: int, prompt: int, history: int, new: int) -> Case:
    """A chunk begins: 16 rows share a prompt, 4 of them a history, and the new tokens are own.

    Launched as recorded passes are: by the bucket.
    """
    _, heads, kv_heads, dim = model
    group, rows = heads // kv_heads, _ROWS * requests
    shares = new <= paged_attention_triton.SPLIT_QUERIES
    of_prompt, of_history = -(-prompt // SPLIT_KEYS), -(-history // SPLIT_KEYS)
    longest = prompt + history + new
    bounds = Bounds(
        rows, rows * new, requests * (of_prompt + _WIDTH * of_history) if shares else 0,
        requests * (prompt // 16 + _WIDTH * (history // 16)) + rows, new, longest,
        new if shares else 0, _ROWS * new if shares else 0,
        of_prompt + of_history if shares else 0,
    )  # fmt: skip
    bucket = Bucket.of(bounds, rows, rows * new, -(-longest // 16))
    keys = requests * (prompt + _WIDTH * history + _ROWS * new)
    moved = keys * 2 * kv_heads * dim * _HALF + 2 * rows * new * heads * dim * _HALF
    flop = 4 * rows * new * longest * heads * dim
    parts = of_prompt + of_history if shares else 0
    partials = rows * new * heads * parts * (dim + 2) * 4
    ended = rows * new * heads * dim * _HALF  # as much as is asked
    of_tails = rows * new * 2 * kv_heads * dim * _HALF + 2 * ended if shares else 0

    def launch() -> None:
        i32 = torch.int32
        tables = [_meta(n, dtype=i32) for n in (rows, rows, rows * new)] if shares else [None] * 3
        paged_attention._triton(
            _half(rows * new, heads, dim), _half(2, 4096, 16, kv_heads, dim),
            _meta(bucket.pages, dtype=i32), _meta(rows, dtype=i32), _meta(rows + 1, dtype=i32),
            dim**-0.5, None, None, None, bucket.max_q, longest, *tables,
            _meta(bucket.splits, 6, dtype=i32) if shares else None, bucket.max_tokens,
            bucket.max_parts, bucket.max_own, _meta(rows, dtype=i32),
        )  # fmt: skip

    def attend(c: Compilation) -> Work:
        table = paged_attention_triton._launch(
            _on(c), bucket.max_q * group, bucket.max_tokens * group, group, dim, _HALF
        )

        def programs(count: int, tokens: int, size: int, walked: int) -> Programs:
            """Of so many tiles of tokens, over so many keys."""
            tiles = count * -(-tokens * group // size) * kv_heads
            return Programs(waits=4, trips=-(-walked // table.keys), count=tiles)

        if not shares:
            return Work(moved, [programs(rows, new, table.tile, longest)], flop)
        size, of_all = table.shared_tile, min(prompt, SPLIT_KEYS)
        tiles = [
            programs(requests * of_prompt, _ROWS * new, size, of_all),
            programs(requests * _WIDTH * of_history, _ROWS // _WIDTH * new, size, history),
        ]
        return Work(moved - of_tails + ended + partials, tiles, flop)

    def finish(_: Compilation) -> Work:
        table = paged_attention_triton._finish(dim)
        trips = parts + -(-new // table.keys)
        count = -(-rows * new * heads // table.items)
        return Work(of_tails + partials, [Programs(waits=4 + 2 * trips, count=count)])

    return Case(
        "paged_attention",
        f"{model.name}, {requests} x {prompt}, {new} new",
        _launched(launch),
        moved,
        {
            "attend": attend,
            "finish": finish,
        },
        flop,
    )  # fmt: skip


def _write_kv(model: _Model, tokens: int) -> Case:
    moved = 4 * tokens * model.kv_heads * model.dim * _HALF

    def launch() -> None:
        k = _half(tokens, model.kv_heads, model.dim)
        pages = _half(2, 64, 16, model.kv_heads, model.dim)
        write_kv._triton(k, k, pages, _meta(tokens))

    return Case(
        "write_kv",
        f"{model.name}, {tokens} tokens",
        _launched(launch),
        moved,
        {"_scatter": lambda c: Work(moved, [Programs(waits=2)])},
    )


def _rms_norm(rows: int, width: int) -> Case:
    moved = 2 * rows * width * _HALF
    return Case(
        "rms_norm",
        f"[{rows}, {width:,}]",
        _launched(lambda: rms_norm._triton(_half(rows, width), _half(width), 1e-6, False)),
        moved,
        {"_normalise": lambda c: Work(moved, [Programs(waits=1, exchanges=1)])},
    )


def _rotate(model: _Model, tokens: int) -> Case:
    moved = 2 * tokens * (model.heads + model.kv_heads) * model.dim * _HALF

    def launch() -> None:
        q, k = (_half(1, n, tokens, model.dim) for n in (model.heads, model.kv_heads))
        cos = _half(1, tokens, model.dim)
        rotate._triton(q, k, cos, cos)

    return Case(
        "rotate",
        f"{model.name}, {tokens} tokens",
        _launched(launch),
        moved,
        {"_turn": lambda c: Work(moved, [Programs(waits=1)])},
    )


def _copy_pages(model: _Model, layers: int, pages: int) -> Case:
    page = 16 * model.kv_heads * model.dim * _HALF
    # As csrc/copy_pages.cu has it: 4 vectors of 16 bytes for each of 256 threads.
    grid = (pages, 2 * layers, -(-page // (256 * 4 * 16)))
    moved = 2 * pages * 2 * layers * page

    def compiled(arch: int) -> list[Compilation]:
        return [built(Path(str(library_path())), arch, "copy_pages", grid, num_warps=8)]

    return Case(
        "copy_pages",
        f"{model.name}, {pages} of 16 tokens",
        compiled,
        moved,
        {"copy_pages": lambda c: Work(moved, [Programs(waits=2)])},
    )


def _three(rows: int, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    return _half(rows, vocab), _half(1, rows, vocab), _half(1, rows, vocab)


def _fuse_logits(rows: int, vocab: int) -> Case:
    moved = rows * vocab * (3 * _HALF + 4)

    def launch() -> None:
        fuse_logits._triton(*_three(rows, vocab), _meta(1, rows, dtype=torch.float32))

    return Case(
        "fuse_logits",
        f"[{rows}, {vocab:,}]",
        _launched(launch),
        moved,
        {"fuse": lambda c: Work(moved, [Programs(waits=2)])},
    )


def _choose_beta(rows: int, vocab: int) -> Case:
    moved = rows * vocab * 3 * _HALF
    chunk, block = 4096, 256

    def grid_sums(c: Compilation) -> Work:
        trips = chunk // block
        return Work(moved, [Programs(waits=trips, exchanges=2 * trips)])

    def choose(c: Compilation) -> Work:
        return Work(rows * -(-vocab // chunk) * 3 * 32 * 4, [Programs(waits=3, exchanges=12)])

    return Case(
        "choose_beta",
        f"[{rows}, {vocab:,}]",
        _launched(lambda: choose_beta._triton(*_three(rows, vocab))),
        moved,
        {"grid_sums": grid_sums, "choose": choose},
    )
