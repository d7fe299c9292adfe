"""What cannot be recorded on the device harms nobody: neither its engine, nor others, nor torch."""

from __future__ import annotations

import warnings

import pytest
import torch

from tests.gpu.test_search import PROMPTS, models, results
from tests.support.tiny_models import tiny_rope
from w2s_fast import Engine, Guide, SearchParams
from w2s_fast.decoding import recorder as module
from w2s_fast.decoding.recorder import CudaRecorder, NothingRecorded

DEVICE = torch.device("cuda", 0)


def tokens(engine: Engine) -> list[list[int]]:
    return [result.token_ids for result in results(engine)]


def good_engine() -> Engine:
    base, tuned, untuned = models(torch.float32)
    return Engine(base, Guide(tuned, untuned), device="cuda", kv_cache_tokens=4096)


def torch_is_as_it_was() -> bool:
    """As after a capture that failed in torch 2.11 it would not be."""
    torch.randn(8, device=DEVICE)  # its generator no longer counts as capturing
    fine = torch.cuda.current_stream(DEVICE) == torch.cuda.default_stream(DEVICE)
    fine &= torch.cuda.get_sync_debug_mode() == 0
    # And its allocator gives back what it has cached when there is nothing else.
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    half = torch.empty(int(total * 0.4), dtype=torch.uint8, device=DEVICE)
    del half
    torch.empty(int(total * 0.6), dtype=torch.uint8, device=DEVICE)
    torch.cuda.empty_cache()
    return fine


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_model_that_waits_in_every_pass_and_then_a_good_engine(kind: str) -> None:
    """With the engine's defaults. Whether longrope waits depends on the version of transformers."""
    base = tiny_rope(kind, torch.float32).to("cuda")
    _, tuned, untuned = models(torch.float32)
    guide = Guide(tuned, untuned)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        engine = Engine(base, guide, device="cuda", kv_cache_tokens=4096)
    told = any("base runs without CUDA graphs: a pass of" in str(w.message) for w in warned)
    assert told or kind == "longrope"
    assert any(len(own) for own in engine.base.recorded) == (not told)
    plain = Engine(base, guide, device="cuda", kv_cache_tokens=4096, cuda_graphs=False)
    params = SearchParams(beam_width=2, successors=2, chunk_length=3, max_new_tokens=9)
    for _ in range(2):
        found, expected = (
            [r.token_ids for r in e.generate(PROMPTS, params)] for e in (engine, plain)
        )
        assert found == expected
    assert all(len(model.recorded[0]) for model in engine.guides[0].models)
    assert not module._failed_on and torch_is_as_it_was()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        good = good_engine()
    assert any(len(own) > 5 for own in good.base.recorded)
    assert tokens(good) == tokens(good)


def test_a_capture_that_fails_leaves_torch_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits in the capture alone, so that its rehearsal does not show it."""
    monkeypatch.setattr(module, "_failed_on", set())
    expected = tokens(good_engine())
    x = torch.ones(4, device=DEVICE)

    def run() -> None:
        x.add_(torch.rand_like(x))
        if torch.cuda.is_current_stream_capturing():
            x.sum().item()

    with pytest.raises(RuntimeError, match="from now on nothing is recorded on cuda:0"):
        CudaRecorder(DEVICE)(run)
    assert torch_is_as_it_was()
    with pytest.raises(NothingRecorded):
        CudaRecorder(DEVICE)(lambda: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = good_engine()  # which now records nothing
    assert not any(len(own) for own in engine.base.recorded)
    assert tokens(engine) == expected


def test_the_first_usual_request_records_nothing() -> None:
    engine = good_engine()
    recorded = [own for model in (engine.base, *engine.guides[0].models) for own in model.recorded]
    before = [len(own) for own in recorded]
    params = SearchParams(beam_width=4, successors=4, chunk_length=5, max_new_tokens=20)
    engine.generate([[1, 2, 3] * 8], params)
    assert [len(own) for own in recorded] == before
    assert engine.stats().finished == 1


def test_two_threads_streams_are_in_order() -> None:
    """Steps that the caller takes on a stream of its own go on with what others have begun."""
    engine = good_engine()
    expected = tokens(engine)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        assert tokens(engine) == expected
        assert torch.cuda.current_stream() == side
    assert tokens(engine) == expected
