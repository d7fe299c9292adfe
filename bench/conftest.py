"""`pytest bench/`: times on the machine at hand, kept and compared by pytest-benchmark.

    pytest bench/ --benchmark-autosave      every group, in its usual sizes
    pytest bench/ -k "operator or page"     some
    pytest bench/ --full                    searches in the sizes of bench.search
    pytest bench/ --quick                   tiny sizes: does it run?
    pytest-benchmark compare                the saved runs, of one commit and another

Ratios to baselines, which want to be taken by turns, are in ``bench.search``; more about the host's
rounds is in ``bench.host``, and about kernels in ``bench.kernels``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest

Sizes = Literal["quick", "usual", "full"]
MOST_ROUNDS = 2000  # of the shortest; all their times are saved


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks of w2s-fast")
    group.addoption("--quick", action="store_true", help="tiny sizes, two rounds: does it run?")
    group.addoption("--full", action="store_true", help="searches in the sizes of bench.search")


def sizes_of(config: pytest.Config) -> Sizes:
    """What was asked for."""
    quick, full = config.getoption("--quick"), config.getoption("--full")
    if quick and full:
        raise pytest.UsageError("--quick and --full exclude each other")
    return "quick" if quick else "full" if full else "usual"


@pytest.fixture
def sizes(pytestconfig: pytest.Config) -> Sizes:
    return sizes_of(pytestconfig)


@pytest.fixture
def rounds(pytestconfig: pytest.Config) -> Callable[[float], int]:
    """How many rounds of so many seconds: those that --benchmark-max-time has room for, and not
    less than --benchmark-min-rounds."""

    def count(seconds: float) -> int:
        if sizes_of(pytestconfig) == "quick":
            return 2
        room = float(pytestconfig.getoption("benchmark_max_time")) / max(seconds, 1e-9)
        least: int = pytestconfig.getoption("benchmark_min_rounds")
        return max(least, min(MOST_ROUNDS, int(room)))

    return count


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of torch's threads, until the end of the test."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    from bench.machine import machine_facts

    facts = machine_facts()
    del facts["threads"]  # as many as each test has set
    machine_info["w2s_fast"] = facts


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_generate_json(benchmarks: list[Any]) -> None:
    """One that was interrupted before its first round is left out, so that the others are saved."""
    benchmarks[:] = [benchmark for benchmark in benchmarks if benchmark]
