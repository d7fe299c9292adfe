"""The host's own time of a round on the GPU path, by requests at once; it needs no GPU.

As ``bench.host`` measures it, at short responses; that also knows long ones, and what is asked of
the device. Every request has W = K = 4.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.host import WARM_UP
from bench.host_engine import HostEngine, Size
from bench.timing import ToldClock

CLOCK = ToldClock()  # without the seconds of stand-ins
MEASURED = 20

pytestmark = pytest.mark.benchmark(group="host's part of a round", timer=CLOCK.now)


@pytest.mark.parametrize("requests", [1, 16, 64])
def test_round(
    benchmark: BenchmarkFixture, requests: int, sizes: str, threads: Callable[[int], None]
) -> None:
    if sizes == "quick" and requests > 1:
        pytest.skip("one size says whether it runs")
    threads(1)
    prompt, measured = (20, 2) if sizes == "quick" else (512, MEASURED)
    chunk = 5
    size = Size(requests, chunk, prompt, longest=(WARM_UP + measured + 2) * chunk)
    host = HostEngine(size)
    with host.searching():
        for _ in range(WARM_UP):
            host.round()
            host.record_missed()
        benchmark.pedantic(lambda: CLOCK.add(host.round()), rounds=measured)
    benchmark.extra_info |= {"rows": size.rows, "chunk": chunk, "prompt": prompt}
