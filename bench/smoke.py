"""Does it work on this machine at all? A few searches on a GPU, and what a round asks of it.

    python -m bench.smoke --out bench/results/smoke.json     on a GPU
    python -m bench.smoke --dry-run --out dry.json           the same on the CPU

Each check is a row; one that fails or breaks hides no other. Models have random weights.
"""

from __future__ import annotations

import copy
import importlib
import platform
import shutil
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from bench import random_models as shapes
from bench.device_trace import Trace, trace
from bench.on_gpu import begin
from bench.reports import INTERRUPTED, run
from bench.rounds import recordings
from tests.support.device import DEVICE as IN_NAME_ONLY
from tests.support.device import Counts, Device
from tests.support.recorder import Recording, set_up_as_on_cuda
from tests.support.tiny_models import tiny_model, tiny_rope
from w2s_fast import Engine, Guide, SearchParams
from w2s_fast.kernels.copy_pages import library_path

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [2, 2], [3, 9], [1, 4, 4], [8]]
PARAMS = [
    SearchParams(beam_width=2, successors=3, chunk_length=3, max_new_tokens=12),
    SearchParams(beam_width=3, successors=2, chunk_length=2, max_new_tokens=12, top_k=0, top_p=0.9),
    SearchParams(method="bon", successors=4, n=2, max_new_tokens=10, top_k=0),
    SearchParams(method="sample", n=3, max_new_tokens=9, min_p=0.05),
    SearchParams(method="fusion", n=3, max_new_tokens=9, plausibility=0.05),
    SearchParams(
        proposal="dynamic_fusion", beam_width=2, successors=2, chunk_length=3, max_new_tokens=9
    ),
    SearchParams(method="beam", beam_width=3, n=2, max_new_tokens=10),
]
HALF = torch.bfloat16
USUAL = SearchParams(max_new_tokens=40, ignore_eos=True)
# What one round may ask for, of whatever size: tests/search/test_round_counts.py holds it to this
# where the device is one in name only.
MOST = Counts(reads=1, copies=3, waits=1, replays=6, launches=1)
_WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")
_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
_COUNTED = 4  # steps
# With a round before them, and one behind, so that nothing ends meanwhile.
_ROUNDS = replace(USUAL, max_new_tokens=(_COUNTED + 2) * 5, chunk_length=5)


@dataclass
class Row:
    """One check. ``found``: numbers that it came to; ``said``: the same in a few words."""

    name: str
    ok: bool
    said: str = ""
    found: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Where:
    """Where the checks run."""

    device: torch.device

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def recorded(self) -> AbstractContextManager[None]:
        """Engines made within replay what they record; on a CPU, what a stand-in records."""
        return nullcontext() if self.cuda else set_up_as_on_cuda(lambda _: Recording)

    def engine(self, base: Any, guide: Guide, **options: Any) -> Engine:
        with self.recorded():
            # On a CPU fewer: each number of rows is recorded.
            rows = 64 if self.cuda else 16
            options = {"kv_cache_tokens": 4096, "max_rows": rows, **options}
            return Engine(base, guide, device=self.device, **options)

    def plain(self, base: Any, guide: Guide) -> Engine:
        """An engine without recordings."""
        return Engine(base, guide, device=self.device, kv_cache_tokens=4096, cuda_graphs=False)

    def models(self, dtype: torch.dtype) -> tuple[PreTrainedModel, Guide]:
        """A tiny base and a tiny guide of another family."""
        base, tuned, untuned = (
            copy.deepcopy(tiny_model(family, seed=seed, layers=layers))
            for family, seed, layers in (("llama", 0, 2), ("gpt2", 1, 1), ("gpt2", 2, 1))
        )
        for model in (base, tuned, untuned):
            torch.nn.Module.to(model, device=self.device, dtype=dtype)
        return base, Guide(tuned, untuned)


def tokens(engine: Engine) -> list[list[list[int]]]:
    """Of all hypotheses of the usual requests."""
    results = engine.generate(PROMPTS, PARAMS, progress=False)
    return [[h.token_ids for h in result.hypotheses] for result in results]


def versions(where: Where) -> Row:
    """What is installed. Without the CUDA library torch copies pages, and several at a time."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for name in ("torch", "triton", "transformers", "numpy", "pytest", "xdist", "setuptools"):
        try:
            found[name] = getattr(importlib.import_module(name), "__version__", "there")
        except ImportError:
            found[name] = None
    found["cuda"] = torch.version.cuda
    found["compute-sanitizer"] = shutil.which("compute-sanitizer")
    path = library_path()
    found["library"] = None if path is None else Path(path).name
    ok = True
    if where.cuda:
        properties = torch.cuda.get_device_properties(where.device)
        found["device"] = properties.name
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["memory_gb"] = properties.total_memory / 1e9
        ok = found["library"] is not None and found["triton"] is not None
    said = ", ".join(f"{name} {found[name]}" for name in ("torch", "triton", "transformers"))
    if where.cuda and found["library"] is None:
        said += "; THE CUDA LIBRARY IS MISSING: csrc/*.cu was not built"
    return Row("versions", ok, said, found)


def as_on_cpu(where: Where) -> Row:
    """A search in float32 finds what the CPU finds."""
    base, guide = where.models(torch.float32)
    found = tokens(where.engine(base, guide))
    cpu = Where(torch.device("cpu"))
    base, guide = cpu.models(torch.float32)
    expected = tokens(cpu.plain(base, guide))
    same = sum(a == b for a, b in zip(found, expected))
    return Row("float32 as on the CPU", found == expected, f"{same} of {len(expected)} requests")


def half_twice(where: Where) -> Row:
    """The same requests twice in half precision."""
    engine = where.engine(*where.models(HALF))
    first, second = tokens(engine), tokens(engine)
    same = sum(a == b for a, b in zip(first, second))
    return Row("bfloat16 twice", first == second, f"{same} of {len(first)} requests")


def waits_in_every_pass(where: Where) -> Row:
    """A model that cannot be recorded, and then a good engine, which can."""
    base = torch.nn.Module.to(tiny_rope("dynamic", torch.float32), device=where.device)
    _, guide = where.models(torch.float32)
    return _then_a_good_engine(where, "waits in every pass", base, guide, True)


def capture_fails(where: Where) -> Row:
    """A model that waits in the capture alone, so that its rehearsal does not show it.

    Afterwards nothing is recorded in this process: it comes last.
    """
    base, guide = where.models(torch.float32)

    def ask(module: Any, given: Any, out: torch.Tensor) -> None:
        if not where.cuda or torch.cuda.is_current_stream_capturing():
            out.sum().item()

    base.get_input_embeddings().register_forward_hook(ask)
    return _then_a_good_engine(where, "capture fails", base, guide, not where.cuda)


def _then_a_good_engine(
    where: Where, name: str, base: Any, guide: Guide, records_after: bool
) -> Row:
    """``records_after``: whether the good engine is to record its passes."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        bad = where.engine(base, guide)
    told = any("runs without CUDA graphs" in str(one.message) for one in warned)
    serves = tokens(bad) == tokens(where.plain(base, guide))
    base, guide = where.models(torch.float32)
    good = where.engine(base, guide)
    right = tokens(good) == tokens(where.plain(base, guide))
    found = {
        "told": told,
        "serves": serves,
        "good_engine_is_right": right,
        "good_engine_recorded": recordings(good),
        "torch_is_as_it_was": _torch_is_as_it_was(where),
    }
    ok = told and serves and right and found["torch_is_as_it_was"]
    ok = ok and (found["good_engine_recorded"] > 0) == records_after
    return Row(name, ok, ", ".join(f"{key} {value}" for key, value in found.items()), found)


def _torch_is_as_it_was(where: Where) -> bool:
    if not where.cuda:
        return True
    torch.randn(8, device=where.device)  # its generator does not count as capturing
    on_default = torch.cuda.current_stream() == torch.cuda.default_stream()
    return bool(on_default and torch.cuda.get_sync_debug_mode() == 0)


def what_a_round_asks(where: Where) -> Row:
    """Waits, copies and launches of a round of one request, from recordings."""
    count = _count_on_cuda if where.cuda else _count_in_name_only
    counts, places = count(where)
    found = {name: getattr(counts, name) for name in vars(MOST) if name != "places"}
    ok = all(value <= getattr(MOST, name) for name, value in found.items())
    said = ", ".join(f"{value} {name}" for name, value in found.items())
    return Row("what a round asks", ok, said, {**found, "places": places})


def _searched(where: Where, engine: Engine) -> None:
    for _ in range(3):  # shapes that come again are recorded
        engine.generate([[1, 2, 3] * 8], _ROUNDS, progress=False)


def _steps(engine: Engine) -> Iterator[Callable[[], None]]:
    """The steps of a search, a round each, but for the first."""
    request = engine.make_request([1, 2, 3] * 8, _ROUNDS)
    engine.runner.submit(request)
    engine.runner.advance([request])
    try:
        for _ in range(_COUNTED):
            yield lambda: engine.runner.advance([request])
    finally:
        engine.runner.give_up(request)
        engine.runner.settle()


def _count_on_cuda(where: Where) -> tuple[Counts, dict[str, int]]:
    """By the calls that the profiler sees; where torch itself says that it waits, the places."""
    engine = where.engine(*where.models(HALF))
    _searched(where, engine)
    found = []
    for step in _steps(engine):
        found.append(counts_of(trace(step, where.device)))
    places: Counter[str] = Counter()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for step in _steps(engine):
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for one in warned:
        if "called a synchronizing" in str(one.message):
            places[f"{'/'.join(Path(one.filename).parts[-2:])}:{one.lineno}"] += 1
    return Counts.largest(found), dict(places)


def counts_of(seen: Trace) -> Counts:
    """By CUDA's calls, and by the copies between the two sides."""
    calls = Counter(call.name for call in seen.calls)
    moved = Counter(one.name.split()[1] for one in seen.device if one.name[:7] == "Memcpy ")
    return Counts(
        reads=moved["DtoH"],
        copies=moved["HtoD"],
        waits=sum(calls[name] for name in _WAITS),
        replays=calls["cudaGraphLaunch"],
        launches=sum(calls[name] for name in _LAUNCHES),
    )


def _count_in_name_only(where: Where) -> tuple[Counts, dict[str, int]]:
    """The same where there is no device: see tests/support/device.py."""
    base, guide = Where(torch.device("cpu")).models(torch.float32)
    with Device() as device:
        with set_up_as_on_cuda(lambda _: device.recorder(Recording)):
            engine = Engine(base, guide, device=IN_NAME_ONLY, kv_cache_tokens=2048, max_rows=16)
        _searched(where, engine)
        found = []
        for step in _steps(engine):
            with device.counting() as counts:
                step()
            found.append(counts)
    most = Counts.largest(found)
    return most, dict(most.places)


def alone_and_among_others(where: Where) -> Row:
    """How many requests differ in half precision: alone, among others, and the second time."""
    if where.cuda:
        wide = shapes.llama(4, 1024, 16, 8, 2816, 32_000)
        base, tuned, untuned = (shapes.make(wide, i, where.device, HALF) for i in range(3))
        count, prompt, params = 16, 64, USUAL
    else:
        base, tuned, untuned = (shapes.make(shapes.TINY, i, where.device, HALF) for i in range(3))
        count, prompt, params = 3, 8, SearchParams(max_new_tokens=5, ignore_eos=True)
    engine = where.engine(
        base, Guide(tuned, untuned), kv_cache_tokens=32_768 if where.cuda else 2048,
        prefix_cache=False, max_rows=16 * count, cuda_graphs=where.cuda,
    )  # fmt: skip
    prompts = shapes.prompts_for(base.config, count, prompt)

    def among() -> list[list[int]]:
        return [r.token_ids for r in engine.generate(prompts, params, progress=False)]

    def alone() -> list[list[int]]:
        return [engine.generate([p], params, progress=False)[0].token_ids for p in prompts]

    first, second, one, again = among(), among(), alone(), alone()
    found = {
        "requests": count,
        "differ_alone": _differ(first, one),
        "differ_the_second_time": _differ(first, second),
        "differ_alone_the_second_time": _differ(one, again),
    }
    said = (
        f"of {count} {found['differ_alone']} differ alone, {found['differ_the_second_time']}"
        f" the second time, {found['differ_alone_the_second_time']} alone the second time"
    )
    return Row("bfloat16 alone and among others", True, said, found)


def _differ(some: list[list[int]], others: list[list[int]]) -> int:
    return sum(a != b for a, b in zip(some, others))


CHECKS: list[Callable[[Where], Row]] = [
    versions,
    as_on_cpu,
    half_twice,
    waits_in_every_pass,
    what_a_round_asks,
    alone_and_among_others,
    capture_fails,
]


def line(rows: list[Row]) -> str:
    """What holds, and the numbers that one asks for first."""
    failed = [row.name for row in rows if not row.ok]
    held = f"{len(rows) - len(failed)} of {len(CHECKS)} hold"
    told = [row.said for row in rows if row.name in ("what a round asks",)]
    told += [row.said for row in rows if row.name.endswith("among others")]
    return "; ".join([held, *(f"FAILED: {name}" for name in failed), *told])


def main(arguments: list[str] | None = None) -> int:
    _, device, _, seconds, report, _ = begin("bench.smoke", __doc__, arguments, seconds=100)
    where = Where(device)
    status = 0
    try:
        for check in CHECKS:
            if seconds.left < 0:
                print(f"left out, for want of time: {check.__name__}", flush=True)
                continue
            started = time.perf_counter()
            try:
                row = check(where)
            except Exception as error:
                traceback.print_exc()
                row = Row(check.__name__, False, f"{type(error).__name__}: {error}"[:300])
            row.seconds = time.perf_counter() - started
            verdict = "ok" if row.ok else "FAILED"
            print(f"{verdict:6} {row.name} ({row.seconds:.1f} s): {row.said}", flush=True)
            report.add(row)
        report.end()
    except KeyboardInterrupt:
        status = INTERRUPTED
    print(line(report.kept))
    return status or int(not all(row.ok for row in report.kept))


if __name__ == "__main__":
    sys.exit(run(main))
