"""Peak memory of the engine in one case, measured in a process that does nothing else.

    python -m bench.search_memory small-guides

Resident memory (Linux's VmHWM) at its peak while the engine is built and answers, less what is
resident once all modules are imported, over the bytes of the models' weights and of the pages that
were in use at one time. What lies between: activations, logits, copies of pages, libraries'
buffers. The pool itself is address space, resident only where tokens were written. The models'
construction is not counted: drawing random weights is not the engine's doing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import GPT2LMHeadModel, PreTrainedModel

from bench.search_cases import BATCH, ENGINE, Bench, Case, cases
from w2s_fast.cache import Int32Array, Ints, PagePool

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Memory:
    """Bytes.

    Attributes:
        imports: resident once torch, transformers and the package are imported.
        models: resident once the models are made, before the engine is.
        peak: resident at most from then on.
        weights: of all models, shared tensors once.
        pages: held at one time at most, over all models.
    """

    imports: int
    models: int
    peak: int
    weights: int
    pages: int

    @property
    def ratio(self) -> float:
        return (self.peak - self.imports) / (self.weights + self.pages)


def measure(case: Case, quick: bool) -> Memory | None:
    """Peak memory of a case in a process of its own; None where the system does not tell."""
    if not Path("/proc/self/status").exists():
        return None
    command = [sys.executable, "-m", "bench.search_memory", case.name]
    said = subprocess.check_output([*command, "--quick"] if quick else command, cwd=ROOT, text=True)
    return Memory(**json.loads(said.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("case", choices=[case.name for case in cases()])
    parser.add_argument("--quick", action="store_true", help="tiny models and texts")
    args = parser.parse_args()
    case = next(case for case in cases(args.quick) if case.name == args.case)
    print(json.dumps(asdict(_measure_here(case))))


def _measure_here(case: Case) -> Memory:
    assert GPT2LMHeadModel is not None  # transformers loads its module when it is named
    imports = _resident("VmRSS")
    bench = Bench(case)
    models = _resident("VmRSS")
    _forget_peak()
    engine = bench.engine
    paged = [engine.base, *(model for guide in engine.guides for model in guide.models)]
    held = [_PagesHeld(model.pool) for model in paged]
    bench.run(BATCH if BATCH in case.variants else ENGINE)
    return Memory(
        imports,
        models,
        peak=_resident("VmHWM"),
        weights=_weight_bytes([model.model for model in paged]),
        pages=sum(pool.most_bytes for pool in held),
    )


class _PagesHeld:
    """Notes how many pages of a pool are held at most: they are only taken in these two calls."""

    def __init__(self, pool: PagePool) -> None:
        self.most_bytes = 0
        reserve, fork = pool.reserve, pool.fork
        page_bytes = pool.page_size * pool.bytes_per_token

        def note() -> None:
            self.most_bytes = max(self.most_bytes, (pool.num_pages - pool.free_pages) * page_bytes)

        def watched_reserve(slots: Ints, tokens: Ints) -> None:
            reserve(slots, tokens)
            note()

        def watched_fork(slots: Ints, counts: Ints) -> Int32Array:
            children = fork(slots, counts)
            note()
            return children

        pool.reserve, pool.fork = watched_reserve, watched_fork  # type: ignore[method-assign]


def _weight_bytes(models: Sequence[PreTrainedModel]) -> int:
    """Of parameters and buffers; what several names or models share is counted once."""
    tensors = {
        tensor.data_ptr(): tensor.nbytes
        for model in models
        for tensor in (*model.parameters(), *model.buffers())
    }
    return sum(tensors.values())


def _resident(field: str) -> int:
    """VmRSS (now) or VmHWM (at most so far), in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def _forget_peak() -> None:
    """Let VmHWM begin anew (man 5 proc)."""
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    main()
