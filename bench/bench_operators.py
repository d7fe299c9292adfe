"""Every operator between hidden states and beams, and attention, beside the machine's limits.

On a GPU the cases of ``bench.kernels``, inside CUDA graphs; on a CPU those of one search with a
GPT-2, and the attention of ``bench.cpu_attention``. What else is known of a call is saved with it:
Python's time to launch it, and its shares of the copy bandwidth and of the product rate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import bench.cpu_attention
from bench.attention_cases import attention_cases
from bench.conftest import Sizes, sizes_of
from bench.kernel_cases import Case, Scale, cases
from bench.kernels import rates
from bench.machine import cores
from bench.timing import Limits, ToldClock, Walk
from w2s_fast.models import onednn

CLOCK = ToldClock()  # of the device, whose times events take
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

pytestmark = pytest.mark.benchmark(group="operators", timer=CLOCK.now)

Timed = Callable[[Callable[[Any], object], Sequence[Any]], float]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        scale: Scale = "gpu" if DEVICE.type == "cuda" else "cpu"
        if sizes_of(metafunc.config) == "quick":
            scale = "tiny"
        found = [*cases(DEVICE, scale), *attention_cases(DEVICE, scale)]
        metafunc.parametrize("case", found, ids=[f"{case.name} {case.shape}" for case in found])


@pytest.fixture
def timed(
    benchmark: BenchmarkFixture,
    rounds: Callable[[float], int],
    sizes: Sizes,
    threads: Callable[[int], None],
) -> Timed:
    """Times a call over its input sets; answers the median, in seconds."""

    def time_rounds(call: Callable[[Any], object], inputs: Sequence[Any]) -> float:
        walk = Walk(call, inputs)
        first = walk.calls * walk.seconds()
        benchmark.pedantic(lambda: CLOCK.add(walk.seconds()), rounds=rounds(first))
        host = walk.host_seconds()
        benchmark.extra_info |= {
            "input_sets": len(inputs),
            "calls_a_round": walk.calls,
            "host_us": None if host is None else 1e6 * host,
            "not_recorded": walk.not_recorded,
        }
        return float(benchmark.stats["median"]) if benchmark.stats else first

    threads(1 if sizes == "quick" else cores())
    return time_rounds


@pytest.fixture(scope="module")
def limits(pytestconfig: pytest.Config) -> Limits:
    """What the machine can do, measured before the first operator."""
    if sizes_of(pytestconfig) == "quick":
        return Limits.measure(DEVICE, 2**20, 128)
    if DEVICE.type == "cuda":
        return Limits.measure(DEVICE)
    return Limits.measure(DEVICE, 2**28, 2048, ["fp32"])  # halves only cost time there


def test_operator(benchmark: BenchmarkFixture, timed: Timed, limits: Limits, case: Case) -> None:
    work = case.make()
    seconds = timed(work.call, work.inputs)
    benchmark.extra_info |= {
        "shape": case.shape,
        "copy_gb_per_s": limits.copy / 1e9,
        "matmul_tflop_per_s": {name: rate / 1e12 for name, rate in limits.matmul.items()},
        **rates(work, seconds, limits),
    }


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the CPU's own way to attend")
@pytest.mark.parametrize("what", ["decode 4 steps", "append 5 tokens"])
@pytest.mark.parametrize("prompt", [64, 1024])
def test_attention(
    benchmark: BenchmarkFixture, timed: Timed, sizes: Sizes, prompt: int, what: str
) -> None:
    quick = sizes == "quick"
    shape = bench.cpu_attention.Shape(2, 2, 8) if quick else bench.cpu_attention.Shape()
    history = 17 if quick else 64
    case = bench.cpu_attention.Case(shape, 20 if quick else prompt, history, requests=1)
    ways = case.decode() if what.startswith("decode") else case.append()
    with torch.inference_mode():
        timed(lambda _: ways["tree"](), [None])
    benchmark.extra_info |= {"shape": vars(shape), "history": history, "rows": len(case.slots)}


# [width, outputs] of GPT-2's head and of its MLP, whose weights lie the other way round.
PRODUCTS = {"head": (768, 50_257), "fc": (768, 3072), "proj": (3072, 768)}


@pytest.mark.skipif(DEVICE.type == "cuda", reason="of a CPU")
@pytest.mark.parametrize("by", ["onednn", "torch"])
@pytest.mark.parametrize("rows", [1, 4, 16, 64])
@pytest.mark.parametrize("product", PRODUCTS)
def test_product(
    benchmark: BenchmarkFixture, timed: Timed, sizes: Sizes, product: str, rows: int, by: str
) -> None:
    width, outputs = (16, 97) if sizes == "quick" else PRODUCTS[product]
    weights = [torch.randn(outputs, width) for _ in range(1 if product == "head" else 8)]
    if product != "head":
        weights = [weight.T.contiguous().T for weight in weights]
    bias = None if product == "head" else torch.randn(outputs)
    hidden = torch.randn(rows, width)
    multiply = onednn if by == "onednn" else torch.nn.functional.linear
    with torch.inference_mode():
        timed(lambda weight: multiply(hidden, weight, bias), weights)
    benchmark.extra_info |= {"width": width, "outputs": outputs}
