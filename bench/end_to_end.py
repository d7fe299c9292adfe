"""Whole searches on a GPU, beside what transformers takes, what was released, and what is possible.

    python -m bench.end_to_end --out bench/results/search.json     on a GPU
    python -m bench.end_to_end --dry-run --out dry.json            tiny models, on the CPU

Models have random weights in bfloat16. A row is one way to run one number of requests: the engine
plainly, with CUDA graphs, and with graphs of compiled models; transformers' ``generate`` of as many
rows, which scores nothing; the search as it was released, of one request; and as many rows of
fused logits, and of four beams a request, a token at a time with graphs. Then what NVIDIA
published for 256 rows of three tokens (SID-GR, Qwen3-1.7B, one H100), here drawn without a guide.
Beside the JSON a text shows the kernels of one round of each search with graphs, and its gaps.
"""

from __future__ import annotations

import functools
import gc
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from bench import random_models as shapes
from bench.baselines import GuideModels, generate_rows, released_search
from bench.device_trace import table
from bench.on_gpu import begin
from bench.reports import INTERRUPTED
from bench.reports import run as run_main
from bench.roofline import Limits, Load, Weights, decode_seconds, score_seconds
from bench.rounds import (
    SETTLED,
    Spans,
    measure,
    recordings,
    rounds_needed,
    synchronize,
    warm_up,
)
from bench.rows import Rows, Seconds
from bench.timing import copy_bandwidth, matmul_rate
from tests.support.recorder import set_up_as_on_cuda
from w2s_fast import Engine, Guide, SearchParams

ROWS = 16  # of a request: W=K=4
PLAIN, GRAPHS, COMPILED = "plain", "graphs", "graphs+compile"
GENERATE, RELEASED = "generate", "released"
FUSION, BEAM = "fusion", "beam"  # methods whose steps are tokens
SETTINGS = ("gpt2-xl", "8B", "Qwen3-1.7B")
_BESIDE_ROUNDS = 3  # of the baselines, and of methods without rounds
# Seconds that have to be left for a way to be begun: estimates, to lose no row that is under way.
_ASKS = {
    PLAIN: 15, GRAPHS: 30, COMPILED: 100, GENERATE: 10, RELEASED: 10, FUSION: 20, BEAM: 15,
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """Models, and searches with W=K=4 in them. ``rounds``: that are timed."""

    name: str
    base: PreTrainedConfig
    guide: PreTrainedConfig
    requests: tuple[int, ...]
    chunk: int
    prompt: int
    rounds: int
    page_size: int = 16

    @property
    def params(self) -> SearchParams:
        new = self.chunk * rounds_needed(max(self.requests), self.prompt, self.rounds)
        return SearchParams(chunk_length=self.chunk, max_new_tokens=new, ignore_eos=True)

    @property
    def kv_tokens(self) -> int:
        """Room for the hypotheses of all requests, each by itself, and the chunks of all rows."""
        page = self.page_size
        own = self.prompt + 4 * (self.params.max_new_tokens + page) + ROWS * (self.chunk + 2 * page)
        return max(self.requests) * own * 11 // 10  # the scheduler leaves some pages free

    def prompts(self, requests: int) -> list[list[int]]:
        return shapes.prompts_for(self.base, requests, self.prompt)


class Wide(NamedTuple):
    """Many short rows behind a long prompt, and what was published for them, in milliseconds."""

    requests: int
    context: int
    published_ms: float | None = None
    published_decode_ms: float | None = None


@dataclass
class Row:
    """One way to run a number of requests; milliseconds of a chunk of all of them.

    Attributes:
        decode_ms, scoring_ms, host_ms: as :class:`bench.rounds.Measured` has them.
        device_share: of the time, in which the device works. limit_ms: by :mod:`bench.roofline`.
        of_limit: that, of the time.
        peak_gb: of torch's memory: weights, pages for the most requests, and passes.
        set_up_s: of the engine. recordings: that were made in all.
    """

    base: str
    requests: int
    way: str
    ms: float | None = None
    decode_ms: float | None = None
    scoring_ms: float | None = None
    host_ms: float | None = None
    device_share: float | None = None
    limit_ms: float | None = None
    of_limit: float | None = None
    peak_gb: float | None = None
    set_up_s: float | None = None
    recordings: int | None = None
    error: str = ""


@dataclass
class WideRow:
    """Milliseconds from the prompts to the results, and of decoding on the device."""

    base: str
    requests: int
    context: int
    rows: int
    ms: float
    decode_ms: float
    published_ms: float | None
    published_decode_ms: float | None
    error: str = ""


@dataclass
class Bench:
    """Where it runs, and what it writes."""

    device: torch.device
    dtype: torch.dtype
    limits: Limits
    seconds: Seconds
    report: Rows
    profile: Path
    only: tuple[str, ...] = ()  # settings and ways; none: all of them

    def asked(self, setting: str, way: str) -> bool:
        """Whether neither the settings nor the ways that were asked for leave it out."""
        settings, ways = (set(self.only) & set(names) for names in (SETTINGS, _ASKS))
        return (not settings or setting in settings) and (not ways or way in ways)

    def has_time_for(self, setting: str, way: str) -> bool:
        """Whether a way may be begun; said where it may not."""
        if self.seconds.left >= _ASKS.get(way, 0):
            return True
        print(f"left out, for want of time: {setting} {way}", flush=True)
        return False

    def attempt(self, setting: str, way: str, rows: Callable[[], Iterator[Any]]) -> None:
        """Add rows as they come. What fails is a row, too, and the others go on."""
        try:
            for row in rows():
                print(row, flush=True)
                self.report.add(row)
        except Exception as error:
            traceback.print_exc()
            self.report.add(Row(setting, 0, way, error=f"{type(error).__name__}: {error}"[:300]))
        if way == COMPILED:
            torch.compiler.reset()
        self.free()

    def free(self) -> None:
        """What nobody refers to any more gives its memory back."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def engine_for(
    base: PreTrainedModel, guides: Sequence[PreTrainedModel], way: str, **options: Any
) -> Engine:
    """An engine that runs a way. On a CPU passes run from fixed tensors; nothing is recorded."""
    device = base.device
    recorded = way != PLAIN
    as_on_cuda: AbstractContextManager[None] = nullcontext()
    if recorded and device.type != "cuda":
        as_on_cuda = set_up_as_on_cuda(lambda _: lambda run: run)
    with as_on_cuda:
        return Engine(
            base,
            Guide(*guides) if guides else None,
            device=device,
            cuda_graphs=recorded,
            compile=way == COMPILED,
            prefix_cache=False,
            **options,
        )


def search_rows(
    bench: Bench, setting: Setting, base: PreTrainedModel, guides: list[PreTrainedModel], way: str
) -> Iterator[Row]:
    """A way, at every number of requests."""
    _forget_peak(bench.device)
    begin = time.perf_counter()
    engine = engine_for(
        base, guides, way,
        max_rows=ROWS * max(setting.requests), kv_cache_tokens=setting.kv_tokens,
        page_size=setting.page_size,
    )  # fmt: skip
    synchronize(bench.device)
    set_up = time.perf_counter() - begin
    models = [Weights.of(guide) for guide in guides]
    for requests in setting.requests:
        if bench.seconds.left < 0:
            print(f"left out, for want of time: {setting.name} {way} {requests}", flush=True)
            continue
        prompts = setting.prompts(requests)
        warm_up(engine, prompts, setting.params)
        found = measure(engine, prompts, setting.params, setting.rounds)
        load = Load(requests, setting.prompt, chunk=setting.chunk)
        histories = [setting.chunk * (SETTLED + i) for i in range(setting.rounds)]
        limit = 1e3 * statistics.mean(
            decode_seconds(Weights.of(base), load, history, bench.limits)
            + score_seconds(models, load, history, bench.limits)
            for history in histories
        )
        if way == GRAPHS and found.trace is not None:
            with bench.profile.open("a") as file:
                file.write(f"{setting.name}, {requests} requests, {way}: a round of all of them\n")
                file.write(table(found.trace) + "\n")
        yield Row(
            setting.name, requests, way, found.ms, found.decode_ms, found.scoring_ms, found.host_ms,
            None if found.busy_ms is None else found.busy_ms / found.ms, limit, limit / found.ms,
            _peak_gb(bench.device), set_up, recordings(engine),
        )  # fmt: skip


def generate_row(
    bench: Bench, setting: Setting, base: PreTrainedModel, requests: int
) -> Iterator[Row]:
    """Transformers' own sampling of as many rows: a chunk of them, without the prompts."""
    if not _generate_fits(base, ROWS * requests * setting.prompt):
        print(f"left out, for want of memory: {setting.name} {GENERATE} {requests}", flush=True)
        return
    _forget_peak(bench.device)
    prompts = torch.tensor(setting.prompts(requests), device=bench.device)
    rows = prompts.repeat_interleave(ROWS, 0)

    def seconds(chunks: int) -> float:
        begin = time.perf_counter()
        generate_rows(base, rows, chunks * setting.chunk, setting.params)
        synchronize(bench.device)
        return time.perf_counter() - begin

    seconds(1)
    ms = 1e3 * (seconds(1 + _BESIDE_ROUNDS) - seconds(1)) / _BESIDE_ROUNDS
    yield Row(setting.name, requests, GENERATE, ms, peak_gb=_peak_gb(bench.device))


def _generate_fits(base: PreTrainedModel, tokens: int) -> bool:
    """Whether there is room for keys of all rows' prompts, and for the pass that makes them."""
    if base.device.type != "cuda":
        return True
    config: Any = base.config
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    per_token = Weights.of(base).kv_bytes + 4 * inner * base.dtype.itemsize
    return bool(tokens * per_token < torch.cuda.mem_get_info(base.device)[0])


def released_row(
    bench: Bench, setting: Setting, base: PreTrainedModel, guides: list[PreTrainedModel]
) -> Iterator[Row]:
    """The search in the way of the code that came with the method: of one request."""
    _forget_peak(bench.device)
    (prompt,) = setting.prompts(1)

    def seconds(rounds: int) -> float:
        new = setting.chunk * rounds
        params = SearchParams(chunk_length=setting.chunk, max_new_tokens=new, ignore_eos=True)
        begin = time.perf_counter()
        released_search(base, [GuideModels(*guides)], prompt, params)
        synchronize(bench.device)
        return time.perf_counter() - begin

    seconds(1)
    ms = 1e3 * seconds(_BESIDE_ROUNDS) / _BESIDE_ROUNDS
    yield Row(setting.name, 1, RELEASED, ms, peak_gb=_peak_gb(bench.device))


def method_rows(
    bench: Bench, setting: Setting, base: PreTrainedModel, guides: list[PreTrainedModel], way: str
) -> Iterator[Row]:
    """A chunk's tokens by a method whose steps are tokens, without the prompts."""
    fused = SearchParams(method="fusion", n=ROWS, ignore_eos=True)
    beams = SearchParams(method="beam", beam_width=4, ignore_eos=True)
    longest = (1 + _BESIDE_ROUNDS) * setting.chunk
    own = setting.prompt + ROWS * (longest + 2 * setting.page_size)
    engine = engine_for(
        base, guides if way == FUSION else [], GRAPHS,
        max_rows=ROWS * max(setting.requests),
        kv_cache_tokens=max(setting.requests) * own * 11 // 10,
        page_size=setting.page_size,
    )  # fmt: skip
    for requests in setting.requests:
        if bench.seconds.left < 0:
            print(f"left out, for want of time: {setting.name} {way} {requests}", flush=True)
            continue
        prompts = setting.prompts(requests)

        def seconds(chunks: int, prompts: list[list[int]] = prompts) -> float:
            params = replace(
                fused if way == FUSION else beams, max_new_tokens=chunks * setting.chunk
            )
            begin = time.perf_counter()
            engine.generate(prompts, params, progress=False)
            synchronize(bench.device)
            return time.perf_counter() - begin

        for _ in range(SETTLED):  # shapes that come again are recorded
            seconds(1 + _BESIDE_ROUNDS)
        ms = 1e3 * (seconds(1 + _BESIDE_ROUNDS) - seconds(1)) / _BESIDE_ROUNDS
        yield Row(setting.name, requests, way, ms, peak_gb=_peak_gb(bench.device))


def run_setting(bench: Bench, setting: Setting, ways: Sequence[str]) -> None:
    """These ways, with models of their own."""
    ways = [way for way in ways if bench.asked(setting.name, way)]
    if not any(bench.has_time_for(setting.name, way) for way in ways):
        return
    name = setting.name
    bench.free()
    base = shapes.make(setting.base, 0, bench.device, bench.dtype)
    if GENERATE in ways and bench.has_time_for(name, GENERATE):
        for count in setting.requests:  # before the guides take their room
            bench.attempt(name, GENERATE, lambda n=count: generate_row(bench, setting, base, n))
    guides = [shapes.make(setting.guide, seed, bench.device, bench.dtype) for seed in (1, 2)]
    for way in ways:
        if way == GENERATE or not bench.has_time_for(name, way):
            continue
        rows = released_row if way == RELEASED else functools.partial(search_rows, way=way)
        if way in (FUSION, BEAM):
            rows = functools.partial(method_rows, way=way)
        bench.attempt(name, way, functools.partial(rows, bench, setting, base, guides))


def wide_rows(
    bench: Bench, name: str, config: PreTrainedConfig, asked: Sequence[Wide], rows: int
) -> Iterator[WideRow]:
    """Rows of three tokens each, all of a prompt's at once; the median of five times."""
    new, page = 3, 16
    bench.free()
    base = shapes.make(config, 0, bench.device, bench.dtype)
    tokens = max(one.requests * (one.context + rows * (new + 2 * page)) for one in asked)
    most = rows * max(one.requests for one in asked)
    engine = engine_for(base, [], GRAPHS, max_rows=most, kv_cache_tokens=tokens * 11 // 10)
    params = SearchParams(method="sample", n=rows, max_new_tokens=new, ignore_eos=True)
    for one in asked:
        if bench.seconds.left < 0:
            print(f"left out, for want of time: {name} {one}", flush=True)
            continue
        prompts = shapes.prompts_for(config, one.requests, one.context)
        warm_up(engine, prompts, params)
        decoding, side = Spans(bench.device), engine._search.base
        found = []
        with mock.patch.object(side, "draw", decoding.around(side.draw)):
            for _ in range(5):
                begin = time.perf_counter()
                engine.generate(prompts, params, progress=False)
                synchronize(bench.device)
                found.append((1e3 * (time.perf_counter() - begin), decoding.take_ms()))
        ms, decode = (statistics.median(numbers) for numbers in zip(*found))
        yield WideRow(
            name, one.requests, one.context, rows, ms, decode,
            one.published_ms, one.published_decode_ms,
        )  # fmt: skip


def lines(rows: Sequence[Any]) -> list[str]:
    """What was found, in a line for each number of requests, and one for all wide rows."""
    by_size: dict[tuple[str, int], dict[str, Row]] = {}
    wide: dict[str, list[WideRow]] = {}
    failed = []
    for row in rows:
        if row.error:
            failed.append(f"{row.base} {row.way}")
        elif isinstance(row, WideRow):
            wide.setdefault(row.base, []).append(row)
        else:
            by_size.setdefault((row.base, row.requests), {})[row.way] = row
    found = []
    for (base, requests), ways in by_size.items():
        times = ", ".join(f"{way} {row.ms:.3g}" for way, row in ways.items())
        best = min((r for r in ways.values() if r.limit_ms), key=lambda r: r.ms or 0, default=None)
        limit = ""
        if best is not None and best.limit_ms and best.of_limit:
            limit = f"; limit {best.limit_ms:.3g}, {best.way} at {100 * best.of_limit:.0f} %"
            if best.device_share is not None:
                limit += f", device busy {100 * best.device_share:.0f} %"
        found.append(f"{base} x {requests}, ms a chunk: {times}{limit}")
    for base, own in wide.items():
        said = "; ".join(
            f"{one.requests} x {one.context}: {one.ms:.3g} ({one.published_ms}), decoding"
            f" {one.decode_ms:.3g} ({one.published_decode_ms})"
            for one in own
        )
        found.append(f"{base}, {own[0].rows} rows of 3 tokens, ms (published): {said}")
    if failed:
        found.append(f"failed: {', '.join(failed)}")
    return found


# In bfloat16 8B and two models of 7B that share its vocabulary are 48 GB; pages for 64 requests are
# more than a GPU of 80 GB has beside them.
_LARGE_GPU = 120 * 10**9


def run(bench: Bench) -> None:
    """Everything, the search itself first: what there is no time for is left out at the end."""
    large = torch.cuda.get_device_properties(bench.device).total_memory > _LARGE_GPU
    xl = Setting("gpt2-xl", shapes.GPT2_XL, shapes.GPT2, (1, 16, 64), 5, 512, 10)
    eight = Setting("8B", shapes.LARGE, shapes.LARGE, (1, 16), 30, 512, 3)
    many = Setting("8B", shapes.LARGE, shapes.LARGE, (64,), 30, 512, 2)
    run_setting(bench, xl, [GRAPHS, FUSION, BEAM])
    run_setting(bench, eight, [GRAPHS])
    asked = [
        Wide(1, 1000, 17.6),
        Wide(8, 1000, 93.2),
        Wide(1, 5000, 42.3, 10.7),
        Wide(8, 5000, 307.9, 51.4),
    ]
    name = "Qwen3-1.7B"
    if bench.asked(name, GRAPHS) and bench.has_time_for(name, GRAPHS):
        bench.attempt(name, GRAPHS, lambda: wide_rows(bench, name, shapes.QWEN3, asked, 256))
    if large:
        run_setting(bench, many, [GRAPHS, PLAIN])
    run_setting(bench, xl, [COMPILED])
    run_setting(bench, xl, [GENERATE, RELEASED, PLAIN])
    run_setting(bench, eight, [GENERATE, RELEASED, PLAIN])
    run_setting(bench, eight, [COMPILED])


def dry_run(bench: Bench) -> None:
    """The same parts with tiny models. To compile even these would take long.

    Pages are small: on a CPU a recorded row computes with all keys that there is room for.
    """
    tiny = Setting("tiny", shapes.TINY, shapes.TINY, (1, 2), 3, 20, 1, page_size=4)
    run_setting(bench, tiny, [GENERATE, RELEASED, GRAPHS, PLAIN, FUSION, BEAM])
    config = shapes.qwen3(1, 32, 4, 2, 8, 48, 97)
    asked = [Wide(1, 20), Wide(2, 40)]
    bench.attempt("wide", GRAPHS, lambda: wide_rows(bench, "wide", config, asked, 4))


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_gb(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None


def main(arguments: list[str] | None = None) -> int:
    dry, device, out, seconds, report, only = begin(
        "bench.end_to_end", __doc__, arguments, seconds=400, parts=[*SETTINGS, *_ASKS]
    )
    dtype = torch.float32 if dry else torch.bfloat16
    profile = out.with_name(f"{out.stem}-rounds.txt")  # the kernels of a round
    profile.write_text("")
    status = 0
    try:
        size, square = (2**20, 128) if dry else (2**30, 8192)
        limits = Limits(copy_bandwidth(device, size), matmul_rate(device, dtype, square))
        report.say(bandwidth=limits.bandwidth, product_rate=limits.rate)
        bench = Bench(device, dtype, limits, seconds, report, profile, only)
        (dry_run if dry else run)(bench)
        report.end()
    except KeyboardInterrupt:
        status = INTERRUPTED
    for line in lines(report.kept):
        print(line)
    return status or int(any(row.error for row in report.kept))


if __name__ == "__main__":
    sys.exit(run_main(main))
