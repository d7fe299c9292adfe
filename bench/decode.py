"""What recorded passes, compilation and streams bring to a whole search on a GPU.

    python -m bench.decode --out bench/results/decode.json     on a GPU
    python -m bench.decode --dry-run --out dry.json            tiny models, any machine

Every row is one way to run the same search, at one number of requests: time of a round, tokens
kept a second, and the time as a ratio to the plain way in the same run. Models have random weights.
Without a GPU nothing is recorded: the passes run from fixed tensors, and only the logic is tested.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.timing import commit
from w2s_fast import Engine, Guide, SearchParams
from w2s_fast.attention import KernelPlan
from w2s_fast.decoding import CudaRecorder, Recorder, record_passes

CHUNK = 5


@dataclass(frozen=True)
class Shape:
    """A Llama's size."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int

    def make(self, seed: int, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
        with device:
            model: LlamaForCausalLM = LlamaForCausalLM(config).to(dtype)
        return model


TINY = Shape(2, 32, 4, 2, 64, 97)
# The shapes of Llama 3.2 1B and of a guide of about 150 million parameters; of Llama 3.1 8B.
SMALL = Shape(12, 768, 12, 4, 2048, 128256)
MEDIUM = Shape(16, 2048, 32, 8, 8192, 128256)
LARGE = Shape(32, 4096, 32, 8, 14336, 128256)


@dataclass
class Row:
    """One way to run, at one number of requests."""

    base: str
    way: str
    requests: int
    set_up_s: float = 0.0
    ms_per_round: float | None = None
    tokens_per_s: float | None = None
    of_plain: float | None = None
    error: str = ""


class NoLane:
    """The current stream and no other."""

    beside = staticmethod(nullcontext)

    def join(self) -> None:
        """Nothing runs beside."""


def run_directly(run: Callable[[], None]) -> Callable[[], None]:
    """In the place of a recording: the same code on the same tensors."""
    return run


def engine_for(base: Any, guides: Any, way: str, max_rows: int) -> Engine:
    """An engine that runs a way: plain, graphs, graphs+compile; "-lane": without streams."""
    device = next(base.parameters()).device
    # On a CPU a pass is computed as if each row had all keys that there is room for.
    tokens, page_size = (64 * 1024, 16) if device.type == "cuda" else (640, 4)
    engine = Engine(base, Guide(*guides), device=device, cuda_graphs=False, prefix_cache=False,
                    kv_cache_tokens=tokens, page_size=page_size, max_rows=max_rows)  # fmt: skip
    if way.endswith("-lane"):
        for guide in engine.guides:
            guide._lane = NoLane()  # type: ignore[assignment]
    if way.startswith("graphs"):
        recorder: Callable[[torch.device], Recorder] = CudaRecorder
        if device.type != "cuda":
            recorder = lambda _: run_directly  # noqa: E731
            for model in engine._search.models:
                model.backend = KernelPlan
        engine._search.base.decoder.graphs = record_passes(
            engine.base,
            engine._search.models[1:],
            vocab_size=engine._models.vocab_size,
            max_rows=max_rows,
            compile="compile" in way,
            recorder_for=recorder,
        )
    return engine


def timed_search(engine: Engine, requests: int, prompt: int, rounds: int) -> float:
    """Seconds of the best of three searches. All their shapes have come twice before."""
    vocabulary = engine._models.vocab_size
    prompts = [[(7 * i + j) % vocabulary for j in range(prompt)] for i in range(requests)]
    params = SearchParams(
        beam_width=4,
        successors=4,
        chunk_length=CHUNK,
        max_new_tokens=CHUNK * rounds,
        ignore_eos=True,
    )
    for _ in range(2):
        engine.generate(prompts, params, progress=False)
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        engine.generate(prompts, params, progress=False)
        best = min(best, time.perf_counter() - begin)
    return best


def measure(
    name: str,
    base: Any,
    guides: Any,
    ways: list[str],
    requests: list[int],
    *,
    prompt: int,
    rounds: int,
    end: float,
) -> list[Row]:
    """Every way at every number of requests; nothing is begun after ``end``."""
    rows: list[Row] = []
    plain: dict[int, float] = {}
    for way in ways:
        if time.monotonic() > end:
            print(f"left out, for want of time: {name} {way}", flush=True)
            continue
        try:
            begin = time.perf_counter()
            engine = engine_for(base, guides, way, max_rows=16 * max(requests))
            set_up = time.perf_counter() - begin
            for count in requests:
                seconds = timed_search(engine, count, prompt, rounds)
                plain.setdefault(count, seconds)
                rows.append(
                    Row(
                        name,
                        way,
                        count,
                        round(set_up, 2),
                        round(1e3 * seconds / rounds, 3),
                        round(count * CHUNK * rounds / seconds, 1),
                        round(seconds / plain[count], 3),
                    )
                )
                print(rows[-1], flush=True)
        except Exception as error:  # the other ways are measured all the same
            traceback.print_exc()
            rows.append(Row(name, way, 0, error=f"{type(error).__name__}: {error}"))
        engine = None  # type: ignore[assignment]
        torch.compiler.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true", help="tiny models, on the CPU if need be")
    parser.add_argument("--seconds", type=float, default=240, help="begin nothing after so long")
    args = parser.parse_args()
    cuda = torch.cuda.is_available() and not args.dry_run
    if not cuda and not args.dry_run:
        sys.exit("bench.decode times a GPU; without one: --dry-run")
    device = torch.device("cuda" if cuda else "cpu")
    end = time.monotonic() + args.seconds
    ways = ["plain", "graphs", "graphs-lane", "graphs+compile"]
    rows: list[Row] = []
    if cuda:
        guides = [SMALL.make(seed, device, torch.bfloat16) for seed in (1, 2)]
        # To compile takes the longest, and so comes last, and only for the smaller one.
        for name, shape, chosen in (("8B", LARGE, ways[:3]), ("1B", MEDIUM, ways)):
            base = shape.make(0, device, torch.bfloat16)
            rows += measure(name, base, guides, chosen, [1, 4, 16], prompt=256, rounds=8, end=end)
            del base
            torch.cuda.empty_cache()
    else:
        torch.set_num_threads(1)
        guides = [TINY.make(seed, device, torch.float32) for seed in (1, 2)]
        base = TINY.make(0, device, torch.float32)
        rows += measure("tiny", base, guides, ways[:3], [1, 2], prompt=20, rounds=2, end=end)
    report = {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "torch": torch.__version__,
        "rows": [asdict(row) for row in rows],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    for row in rows:
        print(f"{row.base:5} {row.way:16} {row.requests:3} requests  {row.ms_per_round} ms a round"
              f"  {row.tokens_per_s} tokens/s  {row.of_plain} x plain  {row.error}")  # fmt: skip
    return 1 if any(row.error for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
