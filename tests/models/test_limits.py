"""Memory: the machine's, or what the control groups around this program leave of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.support.engines import models_of, tiny_engine
from tests.support.tiny_models import VOCABULARY, tiny_model
from w2s_fast.cli.examine import _memory
from w2s_fast.engine import served
from w2s_fast.errors import InvalidRequest
from w2s_fast.models.activations import Activations, activations_of
from w2s_fast.models.limits import Memory, main_memory
from w2s_fast.models.memory import activation_bytes, kv_tokens_that_fit, usual_pass_tokens

GIB = 1 << 30
V1, V2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"
NO_LIMIT = 0x7FFFFFFFFFFFF000  # what version 1 says where there is none


def write(root: Path, files: dict[str, object]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    meminfo = f"MemTotal: {64 * GIB >> 10} kB\nMemAvailable: {48 * GIB >> 10} kB"
    write(tmp_path, {"proc/meminfo": meminfo})
    return tmp_path


def v1(root: Path, group: str, limit: int, used: int, cache: int = 0) -> None:
    folder = f"{V1}/{group}".rstrip("/")
    stat = f"cache 999\ntotal_inactive_file {cache // 2}\ntotal_active_file {cache - cache // 2}"
    write(
        root,
        {
            f"{folder}/memory.limit_in_bytes": limit,
            f"{folder}/memory.usage_in_bytes": used,
            f"{folder}/memory.stat": stat,
        },
    )


def v2(root: Path, group: str, limit: int | str, used: int, cache: int = 0) -> None:
    folder = f"{V2}/{group}".rstrip("/")
    stat = f"anon 999\nfile 999\ninactive_file {cache}\nactive_file 0\nslab_reclaimable 0"
    write(
        root,
        {
            f"{folder}/memory.max": limit,
            f"{folder}/memory.current": used,
            f"{folder}/memory.stat": stat,
        },
    )


def mounted(root: Path, version: int, group: str, top: str = "/") -> None:
    """This program is in ``group``; ``top`` is the group that is mounted."""
    if version == 1:
        text = f"3:cpuset:/\n2:memory:{group}\n0::/elsewhere"
        mount = f"35 31 0:32 {top} /{V1} rw,nosuid - cgroup cgroup rw,memory"
    else:
        text = f"0::{group}"
        mount = f"35 31 0:32 {top} /{V2} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
    other = "23 1 8:1 / / rw - ext4 /dev/root rw\n34 31 0:3 / /sys/fs/cgroup/cpuset rw - cgroup "
    other += "cgroup rw,cpuset"
    write(root, {"proc/self/cgroup": text, "proc/self/mountinfo": f"{other}\n{mount}"})


def test_without_control_groups_it_is_the_machines(machine: Path) -> None:
    assert main_memory(machine) == Memory(48 * GIB, 64 * GIB, None)


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_has_what_its_limit_leaves(version: int, machine: Path) -> None:
    mounted(machine, version, "/")
    (v1 if version == 1 else v2)(machine, "", 4 * GIB, 3 * GIB, cache=2 * GIB)
    name = "memory.limit_in_bytes" if version == 1 else "memory.max"
    folder = machine / (V1 if version == 1 else V2)
    assert main_memory(machine) == Memory(3 * GIB, 4 * GIB, folder / name)


@pytest.mark.parametrize("version", [1, 2])
def test_of_nested_groups_that_counts_which_leaves_the_least(version: int, machine: Path) -> None:
    mounted(machine, version, "/pods/one/inner")
    lay = v1 if version == 1 else v2
    lay(machine, "", NO_LIMIT if version == 1 else "max", 30 * GIB)
    lay(machine, "pods", 16 * GIB, 15 * GIB)
    lay(machine, "pods/one", 8 * GIB, 2 * GIB)
    lay(machine, "pods/one/inner", NO_LIMIT if version == 1 else "max", GIB)
    lay(machine, "pods/other", GIB, GIB)
    memory = main_memory(machine)
    assert (memory.free, memory.total) == (GIB, 16 * GIB)
    assert memory.limit is not None and memory.limit.parent.name == "pods"


@pytest.mark.parametrize("version", [1, 2])
def test_the_mounted_folder_may_be_the_group_itself(version: int, machine: Path) -> None:
    """As in a container that sees its own group alone, under the name it has outside."""
    mounted(machine, version, "/docker/abc/inner", top="/docker/abc")
    lay = v1 if version == 1 else v2
    lay(machine, "", 8 * GIB, 0)
    lay(machine, "inner", 2 * GIB, GIB)
    assert main_memory(machine)[:2] == (GIB, 2 * GIB)


def test_a_group_outside_of_what_is_mounted_is_the_mounted_one(machine: Path) -> None:
    for group in ("/..", "/../sibling", "/"):
        mounted(machine, 2, group, top="/" if group.startswith("/..") else "/docker/abc")
        v2(machine, "", 2 * GIB, GIB)
        assert main_memory(machine)[:2] == (GIB, 2 * GIB)


def test_a_larger_limit_than_the_machine_is_none(machine: Path) -> None:
    mounted(machine, 2, "/")
    v2(machine, "", 100 * GIB, GIB)
    assert main_memory(machine).limit is None


def test_where_processes_are_slowed_down_is_a_limit_too(machine: Path) -> None:
    mounted(machine, 2, "/job")
    v2(machine, "job", 8 * GIB, GIB)
    write(machine, {f"{V2}/job/memory.high": 3 * GIB})
    memory = main_memory(machine)
    assert memory == Memory(2 * GIB, 3 * GIB, machine / V2 / "job/memory.high")


def test_more_in_use_than_allowed_leaves_nothing(machine: Path) -> None:
    mounted(machine, 1, "/")
    v1(machine, "", GIB, 2 * GIB)
    assert main_memory(machine).free == 0


def test_files_that_cannot_be_read_limit_nothing(machine: Path) -> None:
    mounted(machine, 2, "/gone")
    write(machine, {f"{V2}/memory.max": "?", f"{V2}/memory.current": ""})
    assert main_memory(machine).limit is None


def test_doctor_says_which_limit_counts(machine: Path) -> None:
    assert _memory(machine).detail == "64.0 GiB of this machine, 48.0 GiB of it available"
    mounted(machine, 2, "/")
    v2(machine, "", 4 * GIB, GIB)
    limit = machine / V2 / "memory.max"
    assert _memory(machine).detail == f"4.0 GiB by the limit in {limit}, 3.0 GiB of it available"


def test_pages_fit_into_what_the_limit_leaves(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounted(machine, 2, "/")
    v2(machine, "", GIB, GIB - (1 << 20))
    monkeypatch.setattr("w2s_fast.models.memory.main_memory", partial(main_memory, machine))
    model = tiny_model("llama", dtype=torch.float32)
    per_token = 2 * 2 * 2 * 4 * 4  # keys and values, layers, heads, numbers, bytes
    share = (1 << 20) // 4
    assert kv_tokens_that_fit([model, model], 10**9) == share // (2 * per_token)


def test_passes_take_their_room_from_the_pages(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounted(machine, 2, "/")
    v2(machine, "", GIB, GIB - (1 << 20))
    monkeypatch.setattr("w2s_fast.models.memory.main_memory", partial(main_memory, machine))
    model = tiny_model("llama", dtype=torch.float32)
    per_token = 2 * 2 * 2 * 4 * 4
    room = (1 << 20) // 4 - 100_000
    assert kv_tokens_that_fit([model, model], 10**9, 100_000) == room // (2 * per_token)
    assert kv_tokens_that_fit([model, model], 10**9, GIB) == 1


def test_what_passes_need_by_its_definition() -> None:
    base, small, large = Activations(100, 7), Activations(5, 1), Activations(30, 1)
    assert activation_bytes([base], 64, 16) == 64 * 100 + 16 * 7
    assert activation_bytes([base], 4, 16) == 16 * 100 + 16 * 7
    both = [base, small, large, small, small]
    assert activation_bytes(both, 64, 16) == 64 * 100 + 16 * 7 + 64 * 35


@pytest.mark.parametrize(
    ("device", "free", "token_bytes", "tokens"),
    [
        ("cpu", 0, 0, 2048),
        ("cuda", 80 * GIB, 1 << 20, 8192),
        ("cuda", 64 * GIB, 1 << 20, 8192),
        ("cuda", 64 * GIB - 8, 1 << 20, 4096),
        ("cuda", 16 * GIB, 1 << 20, 2048),
        ("cuda", 0, 1 << 20, 512),
    ],
)
def test_tokens_of_a_pass_follow_from_the_memory(
    device: str, free: int, token_bytes: int, tokens: int
) -> None:
    assert usual_pass_tokens(device, free, token_bytes) == tokens


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "mixtral"])
def test_what_a_token_needs_is_measured_without_what_needs_no_token(family: str) -> None:
    model = tiny_model(family, dtype=torch.float32)
    width = VOCABULARY

    def peak(work: Callable[[], object]) -> int:
        """As if tokens through the embedding took 1,000 bytes each, and logits what they do."""
        tokens = logits = 0

        def embedded(_module: object, args: tuple[torch.Tensor, ...], _out: object) -> None:
            nonlocal tokens
            tokens += args[0].numel()

        handle = model.get_input_embeddings().register_forward_hook(embedded)
        with handle:
            found = work()
        if isinstance(found, torch.Tensor) and found.shape[-1] == width:
            logits = found.nbytes
        return 12345 + 1000 * tokens + logits

    assert activations_of(model, peak) == Activations(1000, width * 4)


def test_what_is_in_use_before_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for CUDA's allocator, which had more in use once."""
    use = {"now": 5000, "peak": 9000}
    model = tiny_model("llama", dtype=torch.float32)

    def embedded(_module: object, args: tuple[torch.Tensor, ...], _out: object) -> None:
        use["peak"] = max(use["peak"], use["now"] + 10 * args[0].numel())

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: use["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: use["peak"])
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda _: use.update(peak=use["now"])
    )
    with model.get_input_embeddings().register_forward_hook(embedded):
        assert activations_of(model) == Activations(10, 0)


@pytest.mark.parametrize("asked", [None, 100])
def test_on_cuda_an_engine_measures_and_leaves_room(
    asked: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"base": Activations(2 << 20, 9), "guide": Activations(1 << 20, 9)}
    models = [mock.Mock(device=torch.device("cuda", 0), kind=k) for k in ("base", "guide", "guide")]
    monkeypatch.setattr(served, "activations_of", lambda model: found[model.kind])
    monkeypatch.setattr(served, "free_bytes", lambda _: 65 * GIB)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    tokens, needed = served._passes(models, asked, 256)
    assert tokens == (asked or 2048)  # 4 MiB a token: 8 GiB, not quite an eighth
    assert needed == (max(tokens, 256) * 2 << 20) + 256 * 9 + (tokens * 2 << 20)


def test_an_engine_says_how_large_its_passes_are() -> None:
    assert [m.max_pass_tokens for m in models_of(tiny_engine())] == [2048] * 3
    assert [m.max_pass_tokens for m in models_of(tiny_engine(max_pass_tokens=9))] == [9] * 3
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(InvalidRequest, match="max_pass_tokens"):
            tiny_engine(max_pass_tokens=wrong)


def test_here_there_is_some() -> None:
    memory = main_memory()
    assert 0 < memory.free <= memory.total
