"""A guide that is an adapter beside a model: what one pass of both sides takes.

    python -m bench.adapters --out bench/results/adapters.json     on a GPU
    python -m bench.adapters --dry-run --out dry.json              a small model, any machine

Chunks of both sides are scored in one pass; its time is compared, turn by turn, with that of a pass
of the model alone with as many rows (at most 1.25 x is wanted), and with that of both sides one
after the other. Models and adapters have random weights; the latter are made here, without PEFT.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bench.on_gpu import begin
from bench.random_models import MEDIUM, SMALL, llama, make
from bench.reports import INTERRUPTED, run
from w2s_fast.models import Adapter, Groups, LowRank, PagedModel

CHUNK, HELD = 5, 64  # new tokens of a row, and those that it has
TURNS = 9
DRY = llama(6, 512, 8, 4, 1408, 4096, tied=True)
# What is adapted, by what its modules' names end with.
QV = ("q_proj", "v_proj")
ALL = (*QV, "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class Turn:
    """One pass of both sides.

    Attributes:
        rows: of each side. ms: the median of its turns.
        to_doubled, to_apart: medians of its ratio to the other ways, within a turn.
    """

    model: str
    adapter: str
    rows: int
    ms: float
    to_doubled: float
    to_apart: float


def adapted(model: PreTrainedModel, rank: int, modules: Sequence[str]) -> Adapter:
    """An adapter of random weights; what it is compared with has them merged."""
    merged = copy.deepcopy(model)
    merged.set_attn_implementation("eager")
    deltas: dict[int, Any] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or not name.endswith(tuple(modules)):
            continue
        weight = module.weight
        down = torch.randn(rank, weight.shape[1]).to(weight) / weight.shape[1] ** 0.5
        up = 0.02 * torch.randn(weight.shape[0], rank).to(weight)
        deltas[id(module)] = (
            name,
            LowRank(down, up, 1.0, None, None, module, lambda weight=weight: weight),
        )
        with torch.no_grad():
            merged.get_submodule(name).weight.add_(up @ down)
    return Adapter("random", deltas, None, merged)


def served(model: PreTrainedModel, adapter: Adapter | None = None) -> PagedModel:
    return PagedModel(model, kv_cache_tokens=1 << 15, max_slots=512, adapter=adapter)


class Rows:
    """Rows of some models, each with tokens in its pages, that score a chunk again and again."""

    def __init__(self, models: list[PagedModel], rows: int) -> None:
        self.models, self.groups = models, Groups(models)
        self.slots = [model.pool.allocate(rows) for model in models]
        self.counts = [CHUNK] * rows
        drawn = torch.Generator().manual_seed(0)
        below = models[0].vocab_size
        held = torch.randint(below, (rows * HELD,), generator=drawn)
        self.tokens = torch.randint(below, (rows * CHUNK,), generator=drawn)
        for model, slots in zip(models, self.slots):
            model.forward(slots, held, [HELD] * rows)
        self.there = self.tokens.to(models[0].device)

    @torch.inference_mode()
    def together(self) -> None:
        """All models in one pass."""
        new, counts = [self.tokens] * len(self.models), [self.counts] * len(self.models)
        for m, _, hidden in self.groups.forward(0, self.slots, new, counts):
            self._score(m, hidden)

    @torch.inference_mode()
    def apart(self) -> None:
        """One model after the other."""
        for m, (model, slots) in enumerate(zip(self.models, self.slots)):
            self._score(m, model.forward(slots, self.tokens, self.counts))

    def _score(self, m: int, hidden: Tensor) -> None:
        model, slots = self.models[m], self.slots[m]
        model.token_partials(hidden, self.there).logprobs()
        model.pool.truncate(slots, [HELD] * len(slots))


def seconds_of(call: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def compare(model: PreTrainedModel, adapter: Adapter, rows: int) -> tuple[float, float, float]:
    """Milliseconds of one pass, and its ratios to the model alone and to both apart."""
    both = [served(model), served(model, adapter)]
    ways = [
        Rows(both, rows).together,
        Rows([served(model)], 2 * rows).apart,
        Rows(both, rows).apart,
    ]
    turns = [[seconds_of(way, model.device) for way in ways] for _ in range(TURNS + 2)][2:]
    one, doubled, apart = zip(*turns)
    ratios = [statistics.median(a / b for a, b in zip(one, other)) for other in (doubled, apart)]
    return 1e3 * statistics.median(one), ratios[0], ratios[1]


def main(arguments: list[str] | None = None) -> int:
    dry, device, _, seconds, report, _ = begin("bench.adapters", __doc__, arguments, seconds=50)
    dtype = torch.float32 if dry else torch.bfloat16
    status = 0
    try:
        for name, shape in [("25M", DRY)] if dry else [("150M", SMALL), ("1B", MEDIUM)]:
            model = make(shape, 0, device, dtype)
            for kind, rank, modules in (("r=4 on q, v", 4, QV), ("r=16 on all", 16, ALL)):
                adapter = adapted(model, rank, modules)
                for rows in [16] if dry else [16, 128]:
                    if seconds.left < 0:
                        print(f"left out, for want of time: {name}, {kind}, {rows} rows")
                        continue
                    found = [round(value, 3) for value in compare(model, adapter, rows)]
                    turn = Turn(name, kind, rows, *found)
                    print(turn, flush=True)
                    report.add(turn)
        report.end()
    except KeyboardInterrupt:
        status = INTERRUPTED
    for turn in report.kept:
        ratios = f"{turn.to_doubled} x as many of the model, {turn.to_apart} x both apart"
        print(f"{turn.model:5} {turn.adapter:12} {turn.rows:4} rows {turn.ms:8.2f} ms: {ratios}")
    return status


if __name__ == "__main__":
    sys.exit(run(main))
