"""Recorders of CUDA graphs: a capture that fails leaves the process as it was.

What they call of torch.cuda is stood in for; on a device: tests/gpu/test_failed_captures.py.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.support.cuda import DEVICE, PLACES, Cuda, cuda
from tests.support.engines import MIXED, RAGGED_PROMPTS, found, make_engine, models_of
from tests.support.tiny_models import tiny_model, tiny_rope, tiny_triple
from w2s_fast import Engine
from w2s_fast.attention.kernel import KernelPlan
from w2s_fast.decoding import recorder as module
from w2s_fast.decoding.decode_graphs import DecodeGraphs
from w2s_fast.decoding.lane import Lane
from w2s_fast.decoding.record import record_passes
from w2s_fast.decoding.recorder import CudaRecorder, NothingRecorded
from w2s_fast.decoding.streams import HomeStream

__all__ = ["cuda"]


def adding(x: Tensor) -> Callable[[], None]:
    def run() -> None:
        x.add_(1)

    return run


def as_before(cuda: Cuda) -> bool:
    """Nothing of the process shows that anything was captured, or should have been."""
    return (
        cuda.current_stream().number == 0
        and cuda.capturing is None
        and not cuda.pools
        and not any(generator.capturing for generator in cuda.generators)
        and cuda.get_sync_debug_mode() == 0
        and not module._one_at_a_time.locked()
    )


def test_a_recording_does_it_again(cuda: Cuda) -> None:
    x = torch.zeros(3)
    record = CudaRecorder(DEVICE)
    replay = record(adding(x))
    x.zero_()
    replay()
    replay()
    assert x.tolist() == [2.0] * 3
    assert as_before(cuda) and cuda.captures == 1
    # The recorder's stream has waited for ours, and ours for the rehearsal.
    (ours,) = {number for wait in cuda.waits for number in wait} - {0}
    assert cuda.waits == [(ours, 0), (0, ours)]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", PLACES)
def test_a_capture_that_fails_anywhere_leaves_the_process_as_it_was(
    place: str, error: type[BaseException], cuda: Cuda
) -> None:
    cuda.fail_at, cuda.failure = place, lambda: error("for the test")
    x = torch.zeros(3)

    def run() -> None:
        if cuda.capturing is not None:
            cuda.fail("body")
        x.add_(1)

    first, second = CudaRecorder(DEVICE), CudaRecorder(DEVICE)
    expected = RuntimeError if place == "end" else error
    with pytest.raises(expected, match="previous error" if place == "end" else "for the test"):
        first(run)
    assert as_before(cuda)
    # And that was the last one on this device, whoever asks, though it would work now.
    cuda.fail_at, captures = None, cuda.captures
    for recorder in (first, second, CudaRecorder(DEVICE)):
        with pytest.raises(NothingRecorded):
            recorder(adding(x))
    assert cuda.captures == captures and as_before(cuda)
    CudaRecorder(torch.device("cuda", 1))(adding(x))
    assert cuda.captures == captures + 1


def test_the_error_says_that_nothing_else_is_recorded(cuda: Cuda) -> None:
    cuda.fail_at = "end"
    why = r"previous error .*; from now on nothing is recorded on cuda:0 in this process"
    with pytest.raises(RuntimeError, match=why):
        CudaRecorder(DEVICE)(adding(torch.zeros(1)))


@pytest.mark.parametrize("mode", [0, 1])
def test_what_waits_for_the_device_is_met_before_a_capture_begins(mode: int, cuda: Cuda) -> None:
    cuda.set_sync_debug_mode(mode)
    x = torch.ones(2)

    def run() -> None:
        x.mul_(x.sum().item())

    with pytest.raises(AssertionError, match="waits for the device"):
        CudaRecorder(DEVICE)(run)
    assert cuda.captures == 0 and cuda.get_sync_debug_mode() == mode
    assert cuda.current_stream().number == 0
    CudaRecorder(DEVICE)(adding(x))  # nothing has happened to others
    assert cuda.captures == 1


def test_what_waits_the_first_time_only_is_recorded(cuda: Cuda) -> None:
    """As where kernels are compiled, or a table is made."""
    x, tables = torch.ones(2), []

    def run() -> None:
        if not tables:
            tables.append(x.sum().item())
        x.mul_(2)

    CudaRecorder(DEVICE)(run)
    assert cuda.captures == 1 and as_before(cuda)


def test_the_modes_own_warning_is_not_passed_on(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = torch.cuda.set_sync_debug_mode

    def warning(mode: Any) -> None:
        if mode == "error":
            warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)
        inner(mode)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", warning)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CudaRecorder(DEVICE)(adding(torch.zeros(1)))


# Engines


def recorded(
    base: PreTrainedModel | None = None, hook: Callable[[], None] | None = None
) -> tuple[Engine, Any]:
    """An engine whose passes are recorded by CudaRecorder, and one where nothing is.

    ``base``: None is a Llama. ``hook``: called in each of its layers while passes are recorded.
    """
    models = [base or tiny_model("llama", eos=(), instance="with hooks")]
    models += [tiny_model(family, seed=1, eos=()) for family in ("llama", "gpt2")]
    plain = make_engine(*models)
    engine = make_engine(*models)
    for model in models_of(engine):
        model.backend = KernelPlan
    handle = None
    if hook is not None:
        handle = models[0].base_model.layers[0].register_forward_hook(lambda *_: hook())
    try:
        engine._search.base.expansion.decoder.graphs = record_passes(
            engine.base,
            models_of(engine)[1:],
            vocab_size=engine._models.vocab_size,
            max_rows=16,
            recorder_for=lambda _: CudaRecorder(DEVICE),
        ).alone
    finally:
        if handle is not None:
            handle.remove()
    return engine, plain


def made(engine: Engine) -> list[int]:
    """Recordings of the base's steps, and of the passes of base, tuned and untuned model."""
    steps = engine._search.base.expansion.decoder.graphs
    assert isinstance(steps, DecodeGraphs)
    return [len(steps.recordings), *(len(m.replays.recordings) for m in models_of(engine))]


def test_a_model_whose_capture_fails_is_named_once_and_answers_stay_the_same(cuda: Cuda) -> None:
    """It waits in the capture alone; nothing of the other models is tried any more."""
    x = torch.ones(1)

    def wait() -> None:
        if torch.cuda.is_current_stream_capturing():
            cuda.fail_at = "body"  # the capture is invalid, and so will its end be
            x.item()

    with pytest.warns(UserWarning, match="CUDA graphs") as warned:
        engine, plain = recorded(hook=wait)
    cuda.fail_at = None
    (told,) = [str(w.message) for w in warned if "CUDA graphs" in str(w.message)]
    assert told.startswith("base runs without CUDA graphs: a pass of LlamaForCausalLM cannot be ")
    assert "waits for the device; from now on nothing is recorded on cuda:0" in told
    assert as_before(cuda) and cuda.captures == 1 and made(engine) == [0, 0, 0, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other, _ = recorded()  # a good engine in the same process
        for e in (engine, other):
            for _ in range(2):
                assert found(e.generate(RAGGED_PROMPTS, MIXED)) == found(
                    plain.generate(RAGGED_PROMPTS, MIXED)
                )
    assert cuda.captures == 1 and made(other) == [0, 0, 0, 0]


@pytest.mark.parametrize("kind", ["Mixtral", "Llama"])
def test_a_model_that_waits_is_run_without_and_others_are_recorded(kind: str, cuda: Cuda) -> None:
    """Mixtral asks on the host which experts were chosen, dynamic rope how long a text is."""
    waits = tiny_rope("dynamic") if kind == "Llama" else tiny_model("mixtral", eos=())
    with pytest.warns(UserWarning, match=f"base runs without CUDA graphs: a pass of {kind}"):
        engine, plain = recorded(waits)
    assert not module._failed_on
    steps, base, tuned, untuned = made(engine)
    assert steps == base == 0 and tuned and untuned
    for _ in range(2):
        assert found(engine.generate(RAGGED_PROMPTS, MIXED)) == found(
            plain.generate(RAGGED_PROMPTS, MIXED)
        )
    assert as_before(cuda)


# Streams


def test_streams_are_not_shared_as_long_as_there_are_others(cuda: Cuda) -> None:
    """torch hands out the same ones again after 32."""
    owners = [Lane(DEVICE) for _ in range(20)]
    kept = [owner._streams[0] for owner in owners]
    for _ in range(40):
        assert Lane(DEVICE)._streams[0] not in kept  # and is let go
    owners += [Lane(DEVICE) for _ in range(12)]
    kept = [owner._streams[0] for owner in owners]
    assert len(set(kept)) == 32
    shared = Lane(DEVICE)
    assert shared._streams[0] in kept  # none is left: better shared than refused
    del shared
    gc.collect()
    for _ in owners:  # who shared it has let go of it, and its first owner has not
        assert Lane(DEVICE)._streams[0] in kept
    gone = owners.pop()._streams[0]
    assert Lane(DEVICE)._streams[0] == gone


def test_recorders_and_lanes_have_streams_of_their_own(cuda: Cuda) -> None:
    owners: list[Any] = [own(DEVICE) for _ in range(8) for own in (CudaRecorder, Lane, HomeStream)]
    streams = {own for owner in owners for own in getattr(owner, "_streams", ())}
    streams |= {owner._stream for owner in owners if isinstance(owner, CudaRecorder)}
    assert len(streams) == len(owners)


def test_work_at_home_is_in_order_with_the_callers(cuda: Cuda) -> None:
    home = HomeStream(DEVICE)
    assert len(home._streams) == 1
    at_home = home._streams[0].number
    assert cuda.waits == [(at_home, 0)]  # for what was made on the way here
    cuda.waits.clear()
    theirs = cuda.stream_of(DEVICE)
    cuda.set_stream(theirs)
    home.leave()  # nothing: nobody has entered
    home.enter()
    assert cuda.waits == [(at_home, theirs.number)] and cuda.current_stream().number == at_home
    home.leave()
    home.leave()
    assert cuda.waits == [(at_home, theirs.number), (theirs.number, at_home)]
    assert cuda.current_stream() == theirs


def test_every_turn_of_an_engine_is_at_home_whatever_ends_it(cuda: Cuda) -> None:
    models = tiny_triple()
    engine = make_engine(*models)
    engine.runner._home = home = HomeStream(DEVICE)
    seen: set[Any] = set()
    handles = [
        model.get_input_embeddings().register_forward_hook(
            lambda *_: seen.add(cuda.current_stream())
        )
        for model in models
    ]
    expected = found(make_engine(*models).generate(RAGGED_PROMPTS, MIXED))
    seen.clear()
    assert found(engine.generate(RAGGED_PROMPTS, MIXED)) == expected
    engine.score([[1, 2]], [[3, 4]])
    assert seen == {home._streams[0]} and cuda.current_stream().number == 0
    for handle in handles:
        handle.remove()

    def fail() -> None:
        with engine.runner.turn():
            assert cuda.current_stream() == home._streams[0]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert cuda.current_stream().number == 0
