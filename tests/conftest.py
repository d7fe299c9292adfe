"""Shared setup: the same hypothesis examples in every run, few threads, and little garbage.

torch is imported where tests are collected, and not by the process that hands them out: its workers
begin when it is ready.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from w2s_fast import Engine

settings.register_profile(
    "w2s_fast",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("w2s_fast")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--soak-seconds",
        type=float,
        default=os.environ.get("W2S_FAST_SOAK_SECONDS", "90" if os.environ.get("CI") else "5"),
        help="how long the soak test lets requests come (default: 5; where CI is set: 90)",
    )


# The models are tiny: more threads only wait for each other. So it is in what the tests start, too.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long begins first: otherwise one core works on it alone when all else is done."""
    import torch

    torch.set_num_threads(1)
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


# Garbage of tests is small, and what is imported is none: neither is looked through all the time.
gc.set_threshold(7_000)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # libraries look for what is left when Python ends


@pytest.fixture
def soak_seconds(request: pytest.FixtureRequest) -> float:
    return float(request.config.getoption("--soak-seconds"))


@pytest.fixture(autouse=True)
def no_test_depends_on_the_global_generator() -> None:
    """Anything drawn from torch's own generator is the same in every test, alone or not."""
    import torch

    torch.manual_seed(0)


# What follows imports transformers, which the tests of csrc and of kernels need not wait for.


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Base, tuned and untuned models with their tokenizers, as folders; logits are padded."""
    from tests.support.tiny_models import BYTE_VOCABULARY, save_tiny

    root = tmp_path_factory.mktemp("models")
    return {
        "base": save_tiny(root / "base", "llama", seed=0, vocab_size=270, peak=1.0),
        "tuned": save_tiny(root / "tuned", "gpt2", seed=1, vocab_size=264),
        "untuned": save_tiny(root / "untuned", "gpt2", seed=2, vocab_size=BYTE_VOCABULARY),
    }


@pytest.fixture(scope="module")
def path_engine(folders: dict[str, Path]) -> Engine:
    """An engine over these folders."""
    from w2s_fast import Engine, Guide

    return Engine(
        base=str(folders["base"]),
        guides=Guide(tuned=str(folders["tuned"]), untuned=folders["untuned"]),
        device="cpu",
        kv_cache_tokens=4096,
    )
