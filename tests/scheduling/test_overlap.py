"""The host closes and opens rounds of one cohort while the device runs those of the other.

On a device that does its work when it gets to it, which is a thread here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from tests.support.cohorts import around_steps, in_cohorts, run_out
from tests.support.device import DEVICE
from tests.support.engines import LONG, MIXED, PROMPTS, SEARCH, found, make_engine, quiet
from tests.support.recorded import Recorded
from tests.support.recorder import Recording
from tests.support.slow_device import PATIENCE, SlowDevice
from tests.support.tiny_models import Triple, tiny_triple
from w2s_fast import Engine, SearchParams
from w2s_fast.errors import Aborted
from w2s_fast.search import InFlight, Request

FOUR = [[3, 1, 4], [15], [9, 2, 6, 5], [2, 7]]
ROUNDS = 4  # of SEARCH


@pytest.fixture(scope="module")
def models() -> Triple:
    return tiny_triple(eos=(), layers=1)


@pytest.fixture(scope="module")
def expected(models: Triple) -> dict[str, list[Any]]:
    """What searches find anywhere."""
    e = make_engine(*models)
    return {
        "search": found(e.generate(FOUR, SEARCH)),
        "mixed": found(e.generate(PROMPTS, MIXED)),
        "long": found(e.generate(PROMPTS, replace(LONG, max_new_tokens=20))),
    }


@pytest.fixture(scope="module")
def device(expected: Any) -> Iterator[SlowDevice]:
    with SlowDevice() as device:
        yield device


@pytest.fixture(scope="module")
def engine(models: Triple, device: SlowDevice) -> Engine:
    """Which has recorded what a search of FOUR in two cohorts runs."""
    recorder = device.recorder(Recording)
    e = Recorded.of(models, max_rows=64, recorder=recorder, device=DEVICE).engine
    in_cohorts(e)
    for _ in range(3):
        e.generate(FOUR, SEARCH)
    return e


@pytest.fixture(autouse=True)
def _no_delay(device: SlowDevice) -> Iterator[None]:
    yield
    device.before_replay = lambda: None


def run_all(e: Engine, prompts: Sequence[list[int]], params: SearchParams) -> list[Request]:
    made = [e.make_request(prompt, params) for prompt in prompts]
    for one in made:
        e.runner.submit(one)
    run_out(e, made)
    return made


def test_on_a_slow_device_everybody_finds_the_same(
    engine: Engine, device: SlowDevice, expected: dict[str, list[Any]]
) -> None:
    device.before_replay = lambda: time.sleep(0.001)
    assert found(engine.generate(PROMPTS, MIXED)) == expected["mixed"]
    one_more = engine.make_request(PROMPTS[0], LONG)
    made = [engine.make_request(p, replace(LONG, max_new_tokens=20)) for p in PROMPTS]
    for turn in range(1000):
        if turn < len(made):
            engine.runner.submit(made[turn])
        if turn == 2:
            engine.runner.submit(one_more)
        if turn == 7:
            engine.runner.give_up(one_more)
        engine.runner.advance(())
        if quiet(engine):
            break
    assert isinstance(one_more.error, Aborted)
    assert found([engine.result(one) for one in made]) == expected["long"]


def test_the_host_is_a_step_ahead_of_the_device(
    engine: Engine, device: SlowDevice, expected: dict[str, list[Any]]
) -> None:
    """The device begins a step when the one before it is closed, and the one after it is launched.

    So whatever waits for more than the oldest step in flight would wait for ever.
    """
    gates: list[threading.Event] = []
    launched = finished = 0
    order: list[str] = []

    def open_gates(last: bool = False) -> None:
        """Step n runs when n have been finished, and n + 2 launched; the last ones anyway."""
        for n, gate in enumerate(gates):
            if n <= finished and (n + 1 < launched or last):
                gate.set()

    def launch(_: Any, do: Callable[[], InFlight]) -> InFlight:
        nonlocal launched
        gate, n = threading.Event(), len(gates)
        gates.append(gate)

        def run() -> None:
            assert gate.wait(PATIENCE), f"step {n} was waited for"
            order.append(f"run {n}")

        device.enqueue(run)
        step = do()
        order.append(f"launched {n}")
        launched += 1
        open_gates()
        return step

    def finish(_: Any, do: Callable[[], None]) -> None:
        nonlocal finished
        open_gates(last=not engine.runner._in_flight)
        do()
        order.append(f"closed {finished}")
        finished += 1
        open_gates()

    with around_steps(launch, finish):
        made = run_all(engine, FOUR, SEARCH)
    assert found([engine.result(one) for one in made]) == expected["search"]
    assert launched == finished == 2 * ROUNDS
    for n in range(1, 2 * ROUNDS - 1):
        at = [order.index(what) for what in (f"closed {n - 1}", f"run {n}", f"closed {n}")]
        assert at == sorted(at)
        assert order.index(f"launched {n + 1}") < order.index(f"run {n}")


def test_a_step_is_launched_without_waiting_and_waited_for_once(
    engine: Engine, device: SlowDevice
) -> None:
    waits: dict[str, list[int]] = {"launch": [], "finish": []}

    def counted(part: str, do: Any) -> Any:
        before = device.counts.waits
        out = do()
        waits[part].append(device.counts.waits - before)
        return out

    with around_steps(lambda _, do: counted("launch", do), lambda _, do: counted("finish", do)):
        run_all(engine, FOUR, SEARCH)
    assert waits == {"launch": [0] * 2 * ROUNDS, "finish": [1] * 2 * ROUNDS}
