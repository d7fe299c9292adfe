"""Whole searches: the cases of ``bench.search``, without their baselines.

Tiny models show what the search itself costs; with ``--full`` the models are GPT-2's size.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.conftest import Sizes
from bench.machine import cores
from bench.search_cases import BATCH, ENGINE, Bench, cases

pytestmark = pytest.mark.benchmark(group="searches")

OURS = [
    (case.name, variant)
    for case in cases()
    for variant in case.variants
    if variant in (ENGINE, BATCH)
]


@pytest.mark.parametrize(("name", "variant"), OURS, ids=[": ".join(pair) for pair in OURS])
def test_search(
    benchmark: BenchmarkFixture,
    name: str,
    variant: str,
    sizes: Sizes,
    rounds: Callable[[float], int],
    threads: Callable[[int], None],
) -> None:
    # Tiny operators on several threads would only wait for each other.
    threads(cores() if sizes == "full" else 1)
    case = next(case for case in cases(quick=sizes != "full") if case.name == name)
    if sizes == "quick":
        case = dataclasses.replace(case, batch=2)
    bench = Bench(case)
    if torch.cuda.is_available():
        for model in (bench.base, *(model for guide in bench.guides for model in guide[:2])):
            model.cuda()
    bench.run(variant, new_tokens=2 * case.params.tokens_per_round)
    begin = time.perf_counter()
    tokens = bench.run(variant)
    took = time.perf_counter() - begin
    benchmark.pedantic(bench.run, args=(variant,), rounds=rounds(took))
    benchmark.extra_info |= {"shape": case.shape, "sampled_tokens": tokens}
