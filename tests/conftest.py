"""Shared setup: the same hypothesis examples in every run, and few threads."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

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
        default=os.environ.get("W2S_FAST_SOAK_SECONDS", "120" if os.environ.get("CI") else "40"),
        help="how long the soak test lets requests come (default: 40; where CI is set: 120)",
    )


@pytest.fixture
def soak_seconds(request: pytest.FixtureRequest) -> float:
    return float(request.config.getoption("--soak-seconds"))


torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other


@pytest.fixture(autouse=True)
def no_test_depends_on_the_global_generator() -> None:
    """Anything drawn from torch's own generator is the same in every test, alone or not."""
    torch.manual_seed(0)
