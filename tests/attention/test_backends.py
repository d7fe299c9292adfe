"""Which backend computes attention: chosen once, and refused with a reason where it cannot run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.engines import MIXED, PROMPTS, engine, found, models_of
from tests.support.tiny_models import tiny_model
from w2s_fast import Engine
from w2s_fast.attention import backends
from w2s_fast.attention.backends import BACKENDS, find_backend
from w2s_fast.attention.gathered import GatheredPlan
from w2s_fast.attention.kernel import KernelPlan
from w2s_fast.errors import InvalidRequest
from w2s_fast.models.model import PagedModel

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "triton_runs", "backend"),
    [
        ("auto", True, KernelPlan),
        ("auto", False, GatheredPlan),
        ("triton", True, KernelPlan),
        ("torch", True, GatheredPlan),
        ("torch", False, GatheredPlan),
    ],
)
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_the_choice(
    name: str,
    triton_runs: bool,
    backend: Any,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backends, "runs_triton", lambda device: triton_runs)
    assert find_backend(name, device) is backend


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "runs_triton", lambda device: False)


@pytest.mark.usefixtures("no_triton")
@pytest.mark.parametrize(
    ("device", "backend", "has_triton", "message"),
    [
        (
            CPU, "auto", True,
            "attention 'triton' runs on CUDA devices, and this is cpu: pass attention='torch', or "
            "'auto'",
        ),
        (
            CUDA, "auto", False,
            "attention 'triton' needs Triton, which is not installed: pip install triton",
        ),
        (
            CUDA, "torch", True,
            "attention 'triton' is switched off by W2S_FAST_BACKEND=torch: unset it",
        ),
    ],
)  # fmt: skip
def test_triton_is_refused_where_it_cannot_run(
    device: torch.device,
    backend: str,
    has_triton: bool,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backends, "BACKEND", backend)
    monkeypatch.setattr(backends, "HAS_TRITON", has_triton)
    with pytest.raises(InvalidRequest) as refused:
        find_backend("triton", device)
    assert str(refused.value) == message


@pytest.mark.parametrize("name", ["sdpa", "", "Torch"])
def test_an_unknown_name_is_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        find_backend(name, CPU)
    assert str(refused.value) == f"attention is {name!r}; allowed: auto, triton, flash, torch"


@pytest.mark.usefixtures("no_triton")
@pytest.mark.parametrize("name", sorted({*BACKENDS, "sdpa"} - {"auto", "torch"}))
def test_an_engine_refuses_before_it_loads_models(name: str) -> None:
    with pytest.raises(InvalidRequest, match="attention"):
        Engine("/there/is/no/such/model", device="cpu", attention=name)


@pytest.mark.usefixtures("no_triton")
def test_a_model_refuses_too() -> None:
    with pytest.raises(InvalidRequest, match="runs on CUDA devices"):
        PagedModel(tiny_model("gpt2"), kv_cache_tokens=256, attention="triton")


@pytest.mark.usefixtures("no_triton")
def test_on_a_cpu_auto_is_torch() -> None:
    chosen, automatic = engine(attention="torch"), engine()
    assert all(model.backend is GatheredPlan for e in (chosen, automatic) for model in models_of(e))
    ours, theirs = (e.generate(PROMPTS, MIXED) for e in (chosen, automatic))
    assert found(ours) == found(theirs)
