"""What a round asks of the device: how often the host waits for it, copies to it, launches.

A whole round, that is decoding, guides, selection and fork, from recordings, on a device in name
only. The numbers must not depend on how many requests take part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.device import DEVICE, Counts, Device
from tests.support.engines import LONG_PROMPTS, SEARCH, found, make_engine
from tests.support.recorded import Recorded
from tests.support.recorder import Recording
from tests.support.tiny_models import Triple, tiny_model, tiny_triple
from w2s_fast import Engine, Guide, SearchParams

# At most, in a round of any number of requests.
READS = 1  # what was drawn and selected
COPIES = 2  # all of the base, and all of the guides
WAITS = 1
REPLAYS = 6  # first tokens, 4 steps, and the guides with the selection
LAUNCHES = 1  # what was drawn goes to where the selection reads it

PARAMS = replace(SEARCH, beam_width=4, successors=4, chunk_length=5, max_new_tokens=25)
MOST = 3  # requests


@pytest.fixture(scope="module")
def models() -> Triple:
    return tiny_triple(eos=(), layers=1)


@pytest.fixture(scope="module")
def another(models: Triple) -> Guide:
    """A second guide."""
    kind = {"eos": (), "layers": 1}
    return Guide(tiny_model("llama", seed=11, **kind), tiny_model("llama", seed=12, **kind), 0.5)


@pytest.fixture(scope="module")
def expected(models: Triple) -> list[Any]:
    """What a search finds anywhere; it is done before the device is there, which costs time."""
    return found(make_engine(*models).generate(LONG_PROMPTS[:MOST], PARAMS))


@pytest.fixture(scope="module")
def device(expected: list[Any], another: Guide) -> Iterator[Device]:
    """Within which these tests run."""
    with Device() as device:
        yield device


@pytest.fixture(scope="module")
def engine(models: Triple, device: Device) -> Engine:
    return recorded_on(device, models)


def recorded_on(device: Device, models: Triple, **options: Any) -> Engine:
    recorder = device.recorder(Recording)
    return Recorded.of(
        models, max_rows=16 * MOST, recorder=recorder, device=DEVICE, **options
    ).engine


class Step(NamedTuple):
    """What one step asked for, and how many of the requests' rounds ended in it."""

    counts: Counts
    rounds: int


def run_all(engine: Engine, device: Device, params: Sequence[SearchParams]) -> list[Step]:
    """What a search of requests with these parameters asks for, step by step."""
    own = [engine.make_request(prompt, p, 0) for prompt, p in zip(LONG_PROMPTS, params)]
    for request in own:
        engine.runner.submit(request)
    steps: list[Step] = []
    while under_way := [request for request in own if not request.ended]:
        before = engine.stats().rounds
        with device.counting() as counts:
            engine.runner.advance(under_way)
        steps.append(Step(counts, engine.stats().rounds - before))
    return steps


def steps_of(engine: Engine, device: Device, params: Sequence[SearchParams]) -> list[Step]:
    """The same, when every shape has been recorded: at the third time."""
    for _ in range(3):
        engine.generate(LONG_PROMPTS[: len(params)], params)
    return run_all(engine, device, params)


@pytest.mark.parametrize("requests", [1, MOST])
def test_a_round_asks_for_little_whoever_takes_part(
    engine: Engine, device: Device, requests: int
) -> None:
    steps = steps_of(engine, device, [PARAMS] * requests)
    assert [step.rounds for step in steps] == [requests] * 5, "a step is a round here"
    counted = [step.counts for step in steps[1:]]
    most = Counts.largest(counted)
    assert most.reads <= READS, most.places
    assert most.copies <= COPIES, most.places
    assert most.waits <= WAITS, most.places
    assert most.launches <= LAUNCHES
    assert all(counts.replays == REPLAYS for counts in counted)


def numbers(step: Step) -> tuple[int, int, int, int]:
    counts = step.counts
    return counts.reads, counts.copies, counts.waits, counts.replays


def test_a_guide_more_costs_the_host_nothing_of_that(
    models: Triple, device: Device, another: Guide
) -> None:
    engine = recorded_on(device, models, more_guides=[another])
    steps = steps_of(engine, device, [PARAMS])
    assert [numbers(step) for step in steps[1:]] == [(READS, COPIES, WAITS, REPLAYS)] * 4


def test_a_round_of_a_long_chunk_is_two_steps(engine: Engine, device: Device) -> None:
    """The host looks at 16 tokens, and at the other 14 when they are scored."""
    steps = steps_of(engine, device, [replace(PARAMS, chunk_length=30, max_new_tokens=60)])
    assert [step.rounds for step in steps] == [0, 1] * 2
    drawn, ended = (1, COPIES - 1, 1, 1 + 15), (READS, COPIES, WAITS, 1 + 13 + 1)
    assert [numbers(step) for step in steps[2:]] == [drawn, ended]


def test_rounds_that_end_at_different_times_are_waited_for_once_a_step(
    engine: Engine, device: Device
) -> None:
    """What others draw meanwhile stands in no selection, and is read with it."""
    short = replace(PARAMS, chunk_length=4, max_new_tokens=20)
    long = replace(PARAMS, chunk_length=16, max_new_tokens=48)
    steps = steps_of(engine, device, [short, long])
    assert [step.rounds for step in steps[:5]] == [1, 1, 1, 2, 1]
    counted = [(step.rounds, numbers(step)) for step in steps[1:5]]
    apart, together = ((READS + more, COPIES, WAITS, 1 + 3 + 1) for more in (1, 0))
    assert counted == [(1, apart), (1, apart), (2, together), (1, apart)]


def test_rounds_that_end_soon_after_each_other_are_scored_together(
    engine: Engine, device: Device
) -> None:
    """The host looks once more: where the first ones end, before the others go on."""
    params = [replace(PARAMS, chunk_length=chunk, max_new_tokens=4 * chunk) for chunk in (5, 7)]
    steps = steps_of(engine, device, params)
    assert [step.rounds for step in steps] == [2] * 4
    more = (1, COPIES - 1, 1, 1 + 1)
    once = (READS, COPIES, WAITS, 1 + 4 + 1)
    both = tuple(a + b for a, b in zip(once, more))
    assert [numbers(step) for step in steps[1:]] == [both] * 3


def test_it_was_a_search_that_was_counted(engine: Engine, expected: list[Any]) -> None:
    assert found(engine.generate(LONG_PROMPTS[:MOST], PARAMS)) == expected


# The device in name only


def host() -> Tensor:
    return torch.ones(3)


def copied_twice(x: Tensor) -> list[Tensor]:
    return [host().copy_(x, non_blocking=True), torch.zeros(3).copy_(x, non_blocking=True)]


@pytest.mark.parametrize(
    ("ask", "reads", "copies", "waits"),
    [
        (lambda x: x.tolist(), 1, 0, 1),
        (lambda x: int(x.sum()), 1, 0, 1),
        (lambda x: x[0].item(), 1, 0, 1),
        (lambda x: bool(x.any()), 1, 0, 1),
        (lambda x: x.cpu(), 1, 0, 1),
        (lambda x: x.to("cpu"), 1, 0, 1),
        (lambda x: host().copy_(x), 1, 0, 1),
        (lambda x: x.to(host()), 1, 0, 1),
        (lambda x: x.nonzero(), 1, 0, 1),
        (lambda x: x[x > 0], 1, 0, 1),
        (lambda x: x.repeat_interleave(x.long()), 1, 0, 1),
        (lambda x: torch.tensor([1, 2], device=x.device), 0, 1, 1),
        (lambda x: x.new_tensor([1, 2]), 0, 1, 1),
        (lambda x: host().to(x.device), 0, 1, 1),
        (lambda x: host().to(x), 0, 1, 1),
        (lambda x: torch.from_numpy(np.ones(3)).to(x.device, non_blocking=True), 0, 1, 0),
        (lambda x: x.copy_(host()), 0, 1, 1),
        (lambda x: x.copy_(host(), non_blocking=True), 0, 1, 0),
        (lambda x: x[np.array([0, 2])], 0, 1, 1),
        # Reads that do not block are waited for together: when the host looks, or later.
        (lambda x: [y.tolist() for y in copied_twice(x)], 2, 0, 1),
        (lambda x: copied_twice(x)[1].numpy(), 2, 0, 1),
        (lambda x: copied_twice(x), 2, 0, 1),
        # Nothing crosses.
        (lambda x: x.add_(x).to(x.device).to(torch.float64), 0, 0, 0),
        (lambda x: torch.stack([x, torch.zeros_like(x)]), 0, 0, 0),
        (lambda x: x.repeat_interleave(x.long(), output_size=3), 0, 0, 0),
        (lambda x: (host() + 1).to("cpu").tolist(), 0, 0, 0),
        (lambda x: torch.tensor([1, 2]).numpy(), 0, 0, 0),
    ],
)
def test_what_crosses_is_counted(
    device: Device, ask: Callable[[Tensor], Any], reads: int, copies: int, waits: int
) -> None:
    x = torch.ones(3, device=DEVICE)
    with device.counting() as counts:
        ask(x)
    assert (counts.reads, counts.copies, counts.waits) == (reads, copies, waits)
    assert sum(counts.places.values()) == reads + copies


@pytest.mark.parametrize(
    ("ask", "launches"),
    [
        (lambda x: x + 1, 1),
        (lambda x: x.zero_(), 1),
        (lambda x: x.clone()[:2].fill_(0), 2),
        (lambda x: torch.zeros(3, device=x.device), 1),
        (lambda x: torch.empty(3, device=x.device), 0),
        (lambda x: x[:2].view(2, 1).transpose(0, 1), 0),
        (lambda x: x.copy_(host()), 0),
        (lambda x: host().to(x.device), 0),
        (lambda x: x.cpu(), 0),
        (lambda x: host() + 1, 0),
    ],
)
def test_what_is_launched_is_counted(
    device: Device, ask: Callable[[Tensor], Any], launches: int
) -> None:
    x = torch.ones(3, device=DEVICE)
    with device.counting() as counts:
        ask(x)
    assert counts.launches == launches


def test_a_replay_counts_as_one(device: Device) -> None:
    x = torch.ones(3, device=DEVICE)
    replay = device.recorder(Recording)(lambda: x.add_(x * 2).add_(1))  # type: ignore[arg-type, return-value]
    with device.counting() as counts:
        replay()
        replay()
    assert (counts.replays, counts.launches) == (2, 0)
    assert x.tolist() == [1 + 3 + 9 + 27] * 3


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x + host(),
        lambda x: torch.cat([host(), x]),
        lambda x: host().index_select(0, x.long()),
        lambda x: x.numpy(),
        lambda x: np.asarray(x),
    ],
)
def test_what_a_device_refuses_is_refused(device: Device, ask: Callable[[Tensor], Any]) -> None:
    x = torch.ones(3, device=DEVICE)
    with pytest.raises(AssertionError, match="on the device"):
        ask(x)
