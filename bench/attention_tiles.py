"""Launch parameters of paged_attention tried one by one, for the tables in its launcher.

    python -m bench.attention_tiles --out tiles.json             on a GPU
    python -m bench.attention_tiles --compile-for 90 --out x     compiles the same, without a GPU

Each row is one set of parameters for one search, and the microseconds of a layer's attention.
What is compiled without a GPU is found again in Triton's cache by the same version of Triton.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from bench import reports
from bench.attention_cases import LARGE, Heads, queries_of, search
from bench.rows import Rows, Seconds
from bench.timing import time_call
from w2s_fast.kernels import paged_attention
from w2s_fast.kernels import paged_attention_triton as launcher

XL = Heads(25, 25, 64)  # of gpt2-xl
SMALL = Heads(12, 12, 64)  # of gpt2


class Shape(NamedTuple):
    name: str
    heads: Heads
    requests: int
    prompt: int
    history: int
    drawn: int  # tokens of the chunk so far
    new: int


SHAPES = [
    Shape("8B 16 x 512", LARGE, 16, 512, 64, 8, 1),
    Shape("8B 1 x 4096", LARGE, 1, 4096, 64, 8, 1),
    Shape("8B 1 x 512", LARGE, 1, 512, 64, 8, 1),
    Shape("8B 16 x 512, scoring 5", LARGE, 16, 512, 64, 0, 5),
    Shape("gpt2-xl 32 x 512", XL, 32, 512, 64, 2, 1),
    Shape("gpt2-xl 1 x 512", XL, 1, 512, 64, 2, 1),
    Shape("gpt2 64 x 512, scoring 5", SMALL, 64, 512, 64, 0, 5),
]


class Parameters(NamedTuple):
    """None: as the launcher has it."""

    few: int | None = None
    split: int | None = None
    keys: int | None = None
    warps: int | None = None
    stages: int | None = None
    tile: int | None = None  # the shared one
    items: int | None = None
    at_once: int | None = None
    last_warps: int | None = None


def variants() -> Iterator[Parameters]:
    """The launcher's own, no tails apart, and then one or two parameters at a time."""
    yield Parameters()
    yield Parameters(few=0)
    yield Parameters(stages=2)
    yield Parameters(keys=32)
    yield Parameters(keys=32, stages=2)
    yield Parameters(keys=32, stages=4)
    yield Parameters(split=128)
    yield Parameters(split=512)
    yield Parameters(tile=32)
    yield Parameters(warps=8)
    for items, at_once, warps in ((1, 4, 1), (2, 4, 1), (4, 4, 1), (2, 8, 1), (4, 4, 2), (8, 4, 2)):
        yield Parameters(items=items, at_once=at_once, last_warps=warps)


def apply(given: Parameters, stack: ExitStack) -> None:
    """The launcher with these parameters, until the stack is left."""
    table, last = launcher._launch, launcher._finish

    def launch(*asked: Any) -> Any:
        found = table(*asked)
        return found._replace(
            keys=given.keys or found.keys,
            num_warps=given.warps or found.num_warps,
            num_stages=given.stages or found.num_stages,
            shared_tile=given.tile or found.shared_tile,
            maxnreg=None if given.warps else found.maxnreg,
        )

    def finish(dim: int) -> Any:
        found = last(dim)
        return found._replace(
            items=given.items or found.items,
            keys=given.at_once or found.keys,
            num_warps=given.last_warps or found.num_warps,
        )

    stack.enter_context(mock.patch.object(launcher, "_launch", launch))
    stack.enter_context(mock.patch.object(launcher, "_finish", finish))
    if given.few is not None:
        stack.enter_context(mock.patch.object(launcher, "FEW_KEYS", given.few))
    for module in ("w2s_fast.kernels.paged_attention_triton", "w2s_fast.attention.kernel"):
        if given.split is not None:
            stack.enter_context(mock.patch(f"{module}.SPLIT_KEYS", given.split))


@dataclass
class Row:
    """Microseconds of a layer; ``gb_per_s``: of distinct keys and values. By parameters."""

    shape: str
    parameters: str
    us: float | None = None
    gb_per_s: float | None = None
    differs: float | None = None  # at most, from what the launcher's own parameters give
    error: str = ""


def call(plan: Any, pages: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    tensors = (plan.page_table, plan.lengths, plan.cu_seqlens_q)
    shared, start = plan.shared, plan.table_start
    if q.is_meta:
        tensors = tuple(tensor.to("meta") for tensor in tensors)
        start = None if start is None else start.to("meta")
        shared = (t.to("meta") if isinstance(t, torch.Tensor) else t for t in shared)
    return paged_attention._triton(
        q, pages, *tensors, q.shape[2] ** -0.5, None, None, None, plan.max_q, plan.max_k, *shared,
        start,
    )  # fmt: skip


def told(given: Parameters) -> str:
    named = {name: value for name, value in given._asdict().items() if value is not None}
    return ", ".join(f"{name} {value}" for name, value in named.items()) or "the launcher's"


def measure(shape: Shape, report: Rows, seconds: Seconds, device: torch.device, arch: int) -> None:
    found = search(device, shape.heads, *shape[2:5], shape.drawn + shape.new)
    if shape.drawn:
        found.pool.extend(found.slots, [shape.drawn] * len(found.slots))
    tokens = len(found.slots) * shape.new
    q = queries_of(torch.device("meta") if arch else device, shape.heads, tokens)
    own: torch.Tensor | None = None
    for given in variants():
        if seconds.left < 0:
            return
        row = Row(shape.name, told(given))
        with ExitStack() as stack:
            apply(given, stack)
            try:
                plan = found.plan(shape.new, True)
                if arch:
                    from bench.aot import compilations

                    made = compilations(
                        arch, lambda p=plan: call(p, found.pool.kv[0].to("meta"), q)
                    )
                    print(told(given), *made, sep="\n    ", flush=True)
                    continue
                out = call(plan, found.pool.kv[0], q)
                own = out if own is None else own
                row.differs = float((out.float() - own.float()).abs().max())
                timing = time_call(
                    lambda layer, p=plan: call(p, found.pool.kv[layer], q),
                    range(len(found.pool.kv)), budget=0.04, most=15,
                )  # fmt: skip
                row.us = 1e6 * timing.device_s
                row.gb_per_s = found.moved / timing.device_s / 1e9
                row.error = timing.not_recorded
            except Exception as error:
                traceback.print_exc()
                row.error = f"{type(error).__name__}: {error}"[:200]
        print(row, flush=True)
        report.add(row)


def best(rows: list[Row]) -> Iterator[str]:
    """For each shape the launcher's own, and what was faster."""
    for name in dict.fromkeys(row.shape for row in rows):
        own = sorted((r for r in rows if r.shape == name and r.us), key=lambda r: r.us or 0)
        chosen = next((r for r in own if r.parameters == "the launcher's"), None)
        said = "; ".join(f"{row.us:.1f} {row.parameters}" for row in own[:4])
        yield f"{name}: {chosen.us if chosen else 0:.1f} us; {said}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=100, help="start nothing after this long")
    parser.add_argument("--compile-for", type=int, default=0, metavar="CAPABILITY")
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(arguments)
    device = torch.device("cpu" if args.compile_for else "cuda")
    report = Rows(args.out, reports.facts("bench.attention_tiles", arguments))
    seconds = Seconds(args.seconds)
    for shape in SHAPES:
        measure(shape, report, seconds, device, args.compile_for)
    report.end()
    for line in best(report.kept):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(reports.run(main))
