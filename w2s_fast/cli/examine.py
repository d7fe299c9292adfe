"""What this machine has, which path will run on it, and whether the search computes right here."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from w2s_fast.cli.threads import chosen_count, chosen_waiting, take_usable_cores

if TYPE_CHECKING:
    import torch

Verdict = Literal["ok", "none", "bad"]  # fine; absent, and nothing needs it; broken


class Finding(NamedTuple):
    """One line of the examination."""

    verdict: Verdict
    name: str
    detail: str


SELF_CHECK_TOLERANCE = 1e-3  # nats a score may differ, relative to scores above 1


def examine() -> Iterator[Finding]:
    """Findings one by one, the quick ones first. An examination that breaks is a finding, too."""
    examinations: list[tuple[str, Callable[[], Finding]]] = [
        ("python", _python),
        ("cpu", _cpu),
        ("cpu instructions", _instructions),
        ("memory", _memory),
        ("torch", _torch),
        ("threads", _threads),
        ("gpu", _gpu),
        ("nvcc", _nvcc),
        ("transformers", lambda: _package("transformers", needed=True)),
        ("triton", lambda: _package("triton")),
        ("flash-attn", lambda: _package("flash-attn")),
        ("page manager", _page_manager),
        ("page copies", _page_copies),
        ("dtype", _dtype),
        ("rows", _rows),
        ("passes", _passes),
        ("attention", _attention),
        ("cuda graphs", _cuda_graphs),
        *((f"attention {name}", partial(_backend, name)) for name in ("triton", "flash", "torch")),
        ("kernels", _kernels),
        ("self-check", _self_check_on_one_thread),
    ]
    for name, look in examinations:
        try:
            yield look()
        except Exception as error:
            yield Finding("bad", name, f"{type(error).__name__}: {error}")


def _python() -> Finding:
    return Finding("ok", "python", f"{platform.python_version()} on {platform.platform()}")


def _cpu() -> Finding:
    from w2s_fast.models import usable_cores

    model = _proc_field("/proc/cpuinfo", "model name") or platform.processor() or "unknown"
    allowed, quota = usable_cores()
    of_time = "" if quota is None else f", {quota:g} cores of their time by control groups"
    return Finding("ok", "cpu", f"{model}, {allowed} of {os.cpu_count()} cores usable{of_time}")


def _threads() -> Finding:
    import torch

    take_usable_cores()
    by = f"by {count}" if (count := chosen_count()) else "one for each usable core at most"
    waiting = chosen_waiting() or "OpenMP's own, a while of spinning"
    return Finding("ok", "threads", f"{torch.get_num_threads()}, {by}; they wait by {waiting}")


def _instructions() -> Finding:
    """Those that torch's matrix products and its conversions of half precision profit from."""
    import torch

    relevant = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
    flags = _proc_field("/proc/cpuinfo", "flags") or _proc_field("/proc/cpuinfo", "Features") or ""
    has = [flag for flag in relevant if flag in flags.split()]
    used = torch.backends.cpu.get_cpu_capability()
    return Finding("ok", "cpu instructions", f"torch uses {used}; there are {' '.join(has)}")


def _memory(root: Path = Path("/")) -> Finding:
    from w2s_fast.models import main_memory

    free, total, limit = main_memory(root)
    total_gib, free_gib = (f"{number / 2**30:.1f} GiB" for number in (total, free))
    whose = f"by the limit in {limit}" if limit is not None else "of this machine"
    return Finding("ok", "memory", f"{total_gib} {whose}, {free_gib} of it available")


def _torch() -> Finding:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return Finding("ok", "torch", f"{torch.__version__}, {build}")


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        seen = shutil.which("nvidia-smi") is not None and torch.version.cuda is None
        why = "; this torch is a CPU build" if seen else ""
        return Finding("none", "gpu", f"none that torch can use{why}")
    cards = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        memory = card.total_memory / 2**30
        cards.append(f"{card.name}, {memory:.0f} GiB, sm_{card.major}{card.minor}")
    return Finding("ok", "gpu", f"{'; '.join(cards)}; driver {_driver()}")


def _driver() -> str:
    if (nvidia_smi := shutil.which("nvidia-smi")) is None:
        return "unknown"
    query = [nvidia_smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    return answer.stdout.split("\n")[0].strip() or "unknown"


def _nvcc() -> Finding:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    found = [shutil.which("nvcc", path=str(Path(home) / "bin")) for home in homes if home]
    nvcc = next(filter(None, [*found, shutil.which("nvcc")]), None)
    if nvcc is None:
        return Finding("none", "nvcc", "not found; only building csrc/*.cu needs it")
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    release = next((line for line in answer.stdout.splitlines() if "release" in line), "?")
    return Finding("ok", "nvcc", f"{nvcc}: {release.split(',', 1)[-1].strip()}")


def _package(name: str, needed: bool = False) -> Finding:
    try:
        return Finding("ok", name, metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding("bad" if needed else "none", name, "not installed")


def _page_manager() -> Finding:
    from w2s_fast import _pages

    manager = _pages.PageManager(num_pages=4, page_size=2, max_slots=2, max_pages_per_slot=2)
    slots = manager.allocate(1)
    manager.release(slots)
    manager.check()
    return Finding("ok", "page manager", f"compiled, {Path(str(_pages.__file__)).name}")


def _page_copies() -> Finding:
    from w2s_fast.kernels.copy_pages import library_path

    path = library_path()
    if path is None:
        return Finding("none", "page copies", "no CUDA library was built: torch copies pages")
    ctypes.CDLL(path)
    return Finding("ok", "page copies", f"CUDA library {Path(path).name}")


def _dtype() -> Finding:
    import torch

    from w2s_fast.models import pick_device, pick_dtype, read_as

    device = pick_device("auto")
    if (picked := pick_dtype("auto", device)) is not None:
        return Finding("ok", "dtype", f"auto: {_name(picked)}, on {device}")
    as_half = read_as(torch.float32, device)
    return Finding(
        "ok",
        "dtype",
        f"auto: the checkpoint's, float32 as {_name(as_half)}, on {device}",
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rows() -> Finding:
    from w2s_fast.models import pick_device, total_bytes, usual_rows

    device = pick_device("auto")
    rows = usual_rows(device.type, total_bytes(device))
    return Finding("ok", "rows", f"auto: {rows} candidates in a step, by the memory of {device}")


def _passes() -> Finding:
    from w2s_fast.models import free_bytes, pick_device, usual_pass_tokens

    device = pick_device("auto")
    tokens = usual_pass_tokens(device.type, free_bytes(device), 0)
    less = ", fewer for models that need much memory" if device.type == "cuda" else ""
    return Finding("ok", "passes", f"auto: {tokens} tokens of prompts in a pass, on {device}{less}")


def _attention() -> Finding:
    from w2s_fast.attention import ATTENTION_NAME
    from w2s_fast.kernels.library import runs_triton
    from w2s_fast.models import pick_device

    device = pick_device("auto")
    path = "triton" if runs_triton(device) else "torch"
    return Finding("ok", "attention", f"auto: {path}, on {device} ({ATTENTION_NAME})")


def _cuda_graphs() -> Finding:
    from w2s_fast.attention import find_backend
    from w2s_fast.decoding import can_record
    from w2s_fast.models import pick_device

    device = pick_device("auto")
    if can_record(device, find_backend("auto", device)):
        return Finding("ok", "cuda graphs", "small passes are replayed")
    return Finding("none", "cuda graphs", f"none: they need CUDA and Triton, and this is {device}")


def _backend(name: str) -> Finding:
    """Whether the engine's ``attention=name`` can run here, and if not, why."""
    from w2s_fast.attention import FlashAttention, find_backend
    from w2s_fast.errors import InvalidRequest
    from w2s_fast.models import pick_device

    device = pick_device("auto")
    try:
        backend = find_backend(name, device)
    except InvalidRequest as error:
        why = str(error).removeprefix(f"attention {name!r} ")
        return Finding("none", f"attention {name}", why)
    library = f"flash-attn {backend.version}, " if isinstance(backend, FlashAttention) else ""
    return Finding("ok", f"attention {name}", f"{library}on {device}")


def _kernels() -> Finding:
    from w2s_fast.kernels.library import BACKEND, runs_triton
    from w2s_fast.models import pick_device

    device = pick_device("auto")
    path = "torch"
    if BACKEND == "interpret":
        path = "Triton's interpreter, for tests (W2S_FAST_BACKEND=interpret)"
    elif runs_triton(device):
        path = "Triton"
    return Finding("ok", "kernels", f"path: {path}, on {device}")


def _self_check_on_one_thread() -> Finding:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the bundled models are too small for more
    try:
        return _self_check()
    finally:
        torch.set_num_threads(threads)


def _self_check() -> Finding:
    """Steers a bundled prompt, and scores the answer again by whole forward passes, without KV."""
    from w2s_fast import Engine, Guide, SearchParams
    from w2s_fast.demo import demo_model_paths, held_out_prompts

    paths = demo_model_paths()
    guide = Guide(tuned=str(paths.tuned), untuned=str(paths.untuned))
    # In float32 everywhere: in half precision rounding would hide a mistake of this size.
    engine = Engine(base=str(paths.base), guides=guide, dtype="float32")
    start = time.perf_counter()
    prompt = held_out_prompts(1, seed=0)[0]
    answer = engine.generate([prompt], SearchParams(max_new_tokens=20))[0]
    seconds = time.perf_counter() - start
    if engine.tokenizer is None or answer.score is None:
        return Finding("bad", "self-check", "the bundled models give no tokenizer or no score")
    prompt_ids = list(engine.tokenizer(prompt)["input_ids"])
    tuned, untuned = (
        _sum_logprobs(path, prompt_ids, answer.token_ids) for path in (paths.tuned, paths.untuned)
    )
    error = abs(answer.score - (tuned - untuned))
    verdict: Verdict = "ok" if error <= SELF_CHECK_TOLERANCE * max(1, abs(answer.score)) else "bad"
    return Finding(
        verdict,
        "self-check",
        f"{len(answer.token_ids)} tokens steered in {seconds:.2f} s; score {answer.score:+.4f}, "
        f"recomputed {tuned - untuned:+.4f} (difference {error:.1e})",
    )


def _sum_logprobs(folder: Path, prompt: list[int], response: list[int]) -> float:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(folder), attn_implementation="eager", dtype=torch.float32
    )
    ids = torch.tensor([prompt + response])
    with torch.inference_mode():
        logprobs = model(ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
    picked = logprobs.gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
    return float(picked.sum())


def _proc_field(file: str, name: str) -> str | None:
    """The first value of `name` in a file of "name : value" lines; None where there is none."""
    if not sys.platform.startswith("linux"):
        return None
    for line in Path(file).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None
