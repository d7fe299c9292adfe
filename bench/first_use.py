"""What every operator takes when it is first used: the compiler's time, seen from outside.

    TRITON_CACHE_DIR=$(mktemp -d) python -m bench.first_use --out first.json     on a GPU
    compute-sanitizer python -m bench.first_use --small --only select_beams sample_tokens
    python -m bench.first_use --small                                            any machine

Each runs twice, at usual shapes or at small ones; the difference is what happens but once. Results
are compared with those of plain torch, so that a sanitizer looks at kernels that compute something.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.reports import INTERRUPTED, facts
from bench.reports import run as run_main
from bench.rows import Rows, Seconds
from tests.kernels.forests import Request, attend, make_forest
from w2s_fast.kernels import choose_beta as choosing
from w2s_fast.kernels import fuse_logits as fusing
from w2s_fast.kernels import linear_logprob as heads
from w2s_fast.kernels import paged_attention as attention
from w2s_fast.kernels import rms_norm as norms
from w2s_fast.kernels import rotate as rotary
from w2s_fast.kernels import sample_tokens as sampling
from w2s_fast.kernels import score_select as scoring
from w2s_fast.kernels import select_beams as selecting
from w2s_fast.kernels import token_logprob as logprobs
from w2s_fast.kernels.copy_pages import copy_pages
from w2s_fast.kernels.linear_logprob_partials import Partials
from w2s_fast.kernels.write_kv import write_kv

CANDIDATES, CHUNK = 16, 5


@dataclass
class Row:
    """Seconds of an operator's first call and of its second, the device's work included.

    Attributes:
        agrees: with plain torch; None: there is nothing to compare.
    """

    name: str
    first_s: float | None = None
    second_s: float | None = None
    agrees: bool | None = None
    error: str = ""


class Case(NamedTuple):
    """``call``: the operator. ``expected``: what its result should be, by plain torch."""

    name: str
    call: Callable[[], Tensor | tuple[Tensor, ...]]
    expected: Callable[[], Tensor | tuple[Tensor, ...]] | None = None


def cases(device: torch.device, small: bool) -> Iterator[Case]:
    """Operators in the order of a round. Inputs are made when their turn comes."""
    vocabulary, width, rows = (300, 32, 8) if small else (50_257, 768, CANDIDATES)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    def full(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.full((rows,), value, dtype=dtype, device=device)

    logits = random(rows, vocabulary) * 3
    keys = [torch.arange(rows, device=device) for _ in range(3)]
    for filters, settings in (
        ("", (full(1.0, torch.float32), full(0, torch.int64), full(1.0), full(0.0))),
        (", filters", (full(0.7, torch.float32), full(50, torch.int64), full(0.9), full(0.0))),
    ):
        # To the same bits but for rounding of exp: a token or two may be others.
        yield Case(
            f"sample_tokens{filters}",
            lambda settings=settings: sampling.sample_tokens(logits, *settings, *keys),
        )
    tokens = torch.randint(0, vocabulary, (rows,), device=device)
    yield Case(
        "token_logprob",
        lambda: logprobs.token_logprob(logits, tokens),
        lambda: logprobs._torch(logits, tokens, None, 1.0, None),
    )
    hidden, weight = random(rows, width).to(dtype), random(vocabulary, width).to(dtype)
    yield Case(
        "linear_logprob",
        lambda: heads.linear_logprob(hidden, weight, tokens),
        lambda: heads._torch(hidden, weight, tokens, None, None, 1.0, None),
    )
    yield from _selections(device)
    beta = torch.ones(1, rows, device=device)
    three = (logits, random(1, rows, vocabulary), random(1, rows, vocabulary))
    yield Case(
        "fuse_logits",
        lambda: fusing.fuse_logits(*three, beta),
        lambda: fusing._torch(*three, beta),
    )
    yield Case("choose_beta", lambda: choosing.choose_beta(*three))
    yield from _pages(device, small, dtype)
    yield from _modules(device, small, dtype)


def _selections(device: torch.device) -> Iterator[Case]:
    """One round of W=K=4, L=5."""
    count, new = CANDIDATES, CANDIDATES * CHUNK
    long: dict[str, Any] = {"dtype": torch.int64, "device": device}
    drawn = torch.randint(0, 50, (new,), **long)
    cu_tokens = torch.arange(0, new + 1, CHUNK, device=device)
    previous = torch.zeros(count, dtype=torch.float64, device=device)
    lengths = torch.full((count,), CHUNK, **long)
    parents = torch.arange(count, dtype=torch.int32, device=device) // 4
    siblings = torch.arange(count, device=device) // 4
    cu_candidates = torch.tensor([0, count], **long)
    rounds = (
        torch.tensor([4], **long),
        torch.tensor([False], device=device),
        torch.tensor([True], device=device),
        count,
        4,
    )
    weights = torch.ones(1, dtype=torch.float64, device=device)
    tuned, untuned = -torch.rand(2, 1, new, device=device)
    columns = (weights, drawn, cu_tokens, previous, lengths, parents, siblings, cu_candidates)
    yield Case(
        "select_beams",
        lambda: selecting.select_beams(tuned, untuned, *columns, *rounds).kept,
        lambda: selecting.select_in_torch(tuned, untuned, *columns, *rounds)[2],
    )
    pair = (Partials.of_logprobs(tuned[0]), Partials.of_logprobs(untuned[0]))
    none = torch.zeros(0, **long)
    arguments = (
        [pair], weights, drawn, tuned[0], cu_tokens, previous, lengths - CHUNK, parents, siblings,
        cu_candidates, none, torch.zeros(2, **long), *rounds,
    )  # fmt: skip
    kept = slice(0, 4)
    yield Case(
        "score_select",
        lambda: scoring.score_select(*arguments)[kept].int(),
        lambda: selecting.select_in_torch(tuned, untuned, *columns, *rounds)[2][0],
    )


def _pages(device: torch.device, small: bool, dtype: torch.dtype) -> Iterator[Case]:
    """Attention over a search's rows, decoding and scoring; what writes and copies pages."""
    heads, kv_heads, dim = (4, 2, 16) if small else (12, 12, 64)
    prompt = 70 if small else 600
    nothing = attention._NOTHING_SHARED
    for what, new in (("decoding", 1), ("scoring", CHUNK)):
        rows = Request(prompt, ((2, 18, 30), (2, 1, 4)), (new, new))
        forest = make_forest([rows], heads, kv_heads, dim, dtype=dtype, device=str(device))
        plan = forest.plan()
        case = forest.case(plan)
        yield Case(
            f"paged_attention, {what}",
            lambda forest=forest, plan=plan: attend(forest, plan, scale=0.125),
            lambda case=case: attention._torch(
                *case.tensors(), 0.125, None, None, None, case.max_q, case.max_k, *nothing
            ),
        )
    pages = torch.zeros(2, 8, 16, kv_heads, dim, dtype=dtype, device=device)
    k = torch.randn(4, kv_heads, dim, device=device).to(dtype)
    slots = torch.tensor([3, 17, 40, 127], device=device)

    def written() -> Tensor:
        write_kv(k, -k, pages, slots)
        return pages[0].flatten(0, 1)[slots]

    yield Case("write_kv", written, lambda: k)
    kv = torch.randn(2, 2, 8, 16, kv_heads, dim, device=device).to(dtype)
    pairs = torch.tensor([[0, 4], [1, -1], [2, 5]], dtype=torch.int32, device=device)

    def copied() -> Tensor:
        copy_pages(kv, pairs)
        return kv[:, :, 4:6]

    yield Case("copy_pages", copied, lambda: kv[:, :, [0, 2]])


def _modules(device: torch.device, small: bool, dtype: torch.dtype) -> Iterator[Case]:
    """What a layer has beside products and attention, for 16 rows."""
    width, heads, kv_heads, dim = (64, 4, 2, 16) if small else (4096, 32, 8, 128)
    x, weight = (torch.randn(*shape, device=device).to(dtype) for shape in ((16, width), (width,)))
    yield Case(
        "rms_norm",
        lambda: norms.rms_norm(x, weight, 1e-6),
        lambda: norms._torch(x, weight, 1e-6, False),
    )
    q, k = (torch.randn(1, n, 16, dim, device=device).to(dtype) for n in (heads, kv_heads))
    cos, sin = torch.rand(2, 1, 16, dim, device=device).to(dtype)
    yield Case(
        "rotate",
        lambda: rotary.rotate(q, k, cos, sin),
        lambda: rotary._torch(q, k, cos, sin),
    )


def _agree(found: Tensor | tuple[Tensor, ...], expected: Tensor | tuple[Tensor, ...]) -> bool:
    ours, theirs = ((x,) if isinstance(x, Tensor) else x for x in (found, expected))
    return all(
        torch.allclose(a.cpu().double(), b.cpu().double(), atol=0.05, rtol=0.05)
        for a, b in zip(ours, theirs)
    )


def run(case: Case, device: torch.device) -> Row:
    """Twice."""

    def seconds() -> float:
        begin = time.perf_counter()
        case.call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    first, second = seconds(), seconds()
    agrees = None if case.expected is None else _agree(case.call(), case.expected())
    return Row(
        case.name, first, second, agrees, "" if agrees is not False else "differs from torch"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument("--small", action="store_true", help="small shapes")
    parser.add_argument("--only", nargs="+", help="operators whose names begin so")
    parser.add_argument("--seconds", type=float, default=60, help="begin nothing after so long")
    args = parser.parse_args(arguments)
    seconds = Seconds(args.seconds)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    arguments = sys.argv[1:] if arguments is None else arguments
    report = Rows(args.out, facts("bench.first_use", arguments))
    status = 0
    try:
        for case in cases(device, args.small):
            if args.only and not case.name.startswith(tuple(args.only)):
                continue
            if seconds.left < 0:
                print(f"left out, for want of time: {case.name}", flush=True)
                continue
            try:
                row = run(case, device)
            except Exception as error:
                traceback.print_exc()
                row = Row(case.name, error=f"{type(error).__name__}: {error}"[:300])
            print(row, flush=True)
            report.add(row)
        report.end()
    except KeyboardInterrupt:
        status = INTERRUPTED
    rows: list[Row] = report.kept
    slow = sorted((row for row in rows if row.first_s), key=lambda row: -(row.first_s or 0))[:3]
    print(
        f"{len(rows)} operators first used in {sum(row.first_s or 0 for row in rows):.1f} s; "
        + ", ".join(f"{row.name} {row.first_s:.1f}" for row in slow)
        + "".join(f"; {row.name}: {row.error}" for row in rows if row.error)
    )
    return status or int(any(row.error for row in rows))


if __name__ == "__main__":
    sys.exit(run_main(main))
