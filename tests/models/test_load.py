"""Which dtype ``"auto"`` takes, and how many rows a step has where nobody says it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.engines import tiny_engine
from tests.support.tiny_models import save_tiny, tiny_model
from w2s_fast.cli.examine import _dtype, _passes, _rows
from w2s_fast.cli.models import made_by, name_models
from w2s_fast.models import memory
from w2s_fast.models.limits import Memory
from w2s_fast.models.load import load_model, pick_dtype, read_as
from w2s_fast.models.memory import usual_rows

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
GB = 10**9
GIB = 1 << 30


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A GPU of compute capability 9.0 whose tensors lie on the CPU."""
    to = nn.Module.to

    def stay(self: nn.Module, *args: Any, **options: Any) -> nn.Module:
        if options.get("device") == CUDA:
            options["device"] = CPU
        return to(self, *(CPU if arg == CUDA else arg for arg in args), **options)

    monkeypatch.setattr(nn.Module, "to", stay)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    return monkeypatch


@pytest.mark.parametrize(
    ("capability", "checkpoint", "read"),
    [
        ((7, 5), FLOAT32, FLOAT32),  # no products in bfloat16
        ((8, 0), FLOAT32, BFLOAT16),
        ((9, 0), FLOAT32, BFLOAT16),
        ((9, 0), FLOAT16, FLOAT16),
        ((9, 0), BFLOAT16, BFLOAT16),
        ((9, 0), torch.float64, torch.float64),
    ],
)
def test_float32_is_read_as_bfloat16_where_a_gpu_has_products_for_it(
    capability: tuple[int, int], checkpoint: torch.dtype, read: torch.dtype, gpu: Any
) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert read_as(checkpoint, CUDA) is read
    assert read_as(checkpoint, torch.device("mps")) is checkpoint
    assert pick_dtype("auto", CUDA) is None and pick_dtype("auto", CPU) is FLOAT32


@pytest.mark.parametrize("saved", [FLOAT32, FLOAT16, BFLOAT16])
@pytest.mark.parametrize("says", [True, False])
def test_a_checkpoint_is_loaded_by_the_dtype_of_its_weights(
    saved: torch.dtype, says: bool, tmp_path: Path, gpu: Any
) -> None:
    """Whether its config names it or not, as those of the first models do not."""
    save_tiny(tmp_path, "llama", dtype=saved)
    if not says:
        config = (tmp_path / "config.json").read_text()
        lines = [line for line in config.splitlines() if '"dtype"' not in line]
        assert len(lines) < len(config.splitlines())
        (tmp_path / "config.json").write_text("\n".join(lines))
    expected = {FLOAT32: BFLOAT16}.get(saved, saved)
    model = load_model(tmp_path, CUDA, "auto")
    assert {weight.dtype for weight in model.parameters()} == {expected}
    # Rotary frequencies stay what they are in every dtype.
    assert {buffer.dtype for buffer in model.buffers()} == {FLOAT32}
    assert load_model(tmp_path, CUDA, "float32").dtype is FLOAT32
    assert load_model(tmp_path, CPU, "auto").dtype is FLOAT32


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16])
def test_a_loaded_model_keeps_its_own(dtype: torch.dtype, gpu: Any) -> None:
    model = tiny_model("llama", dtype=dtype, instance="of its own")
    assert load_model(model, CUDA, "auto") is model
    assert model.dtype is dtype


@pytest.mark.parametrize(
    ("device", "total", "rows"),
    [
        ("cpu", 8 * GB, 256),
        ("cpu", 2000 * GB, 256),
        ("cuda", 16 * GB, 256),
        ("cuda", 48 * GIB, 256),
        ("cuda", 78 * GIB, 1024),  # one that is sold as having 80 GB
        ("cuda", 139 * GIB, 1024),
    ],
)
def test_rows_of_a_step_follow_from_the_memory(device: str, total: int, rows: int) -> None:
    assert usual_rows(device, total) == rows


def test_an_engine_says_how_many_rows_its_steps_have() -> None:
    assert tiny_engine().stats().max_rows == 256
    assert tiny_engine(max_rows=7).stats().max_rows == 7


def test_an_examination_says_what_auto_is_on_a_gpu(gpu: Any) -> None:
    gpu.setattr("w2s_fast.models.pick_device", lambda _: CUDA)
    gpu.setattr("w2s_fast.models.total_bytes", lambda _: 80 * GIB)
    assert _dtype().detail == "auto: the checkpoint's, float32 as bfloat16, on cuda:0"
    assert _rows().detail == "auto: 1024 candidates in a step, by the memory of cuda:0"
    gpu.setattr("w2s_fast.models.free_bytes", lambda _: 70 * GIB)
    assert _passes().detail == (
        "auto: 8192 tokens of prompts in a pass, on cuda:0, fewer for models that need much memory"
    )


def test_an_examination_says_what_a_pass_is_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("w2s_fast.models.pick_device", lambda _: CPU)
    assert _passes().detail == "auto: 2048 tokens of prompts in a pass, on cpu"


def test_records_say_which_dtype_the_models_had(tmp_path: Path, gpu: Any) -> None:
    models = name_models(str(save_tiny(tmp_path)), [], [], [])
    gpu.setattr("w2s_fast.models.pick_device", torch.device)
    assert made_by(models, "cuda", "auto")["dtype"] == "checkpoint's, float32 as bfloat16"
    assert made_by(models, "cuda", "float16")["dtype"] == "float16"
    assert made_by(models, "cpu", "auto")["dtype"] == "float32"
    gpu.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    assert made_by(models, "cuda", "auto")["dtype"] == "checkpoint's"


def test_memory_of_a_cpu_is_what_this_program_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "main_memory", lambda: Memory(free=1, total=3 * GIB, limit=None))
    assert memory.total_bytes(CPU) == 3 * GIB
