"""`transformers serve`, in a process of its own with the bundled base: another server than ours."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest

from tests.remote.test_counting import check
from tests.support.probed import probed_once
from w2s_fast import Engine, Guide, RemoteBase, SearchParams
from w2s_fast.demo import demo_model_paths
from w2s_fast.errors import RemoteFailure

PATIENCE = 120  # seconds
SEARCH = SearchParams(
    beam_width=2, successors=2, chunk_length=5, max_new_tokens=15, top_k=0, trace=True
)
PROMPT = "The film"


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
    log = tmp_path_factory.mktemp("transformers") / "log"
    command = Path(sys.executable).with_name("transformers")
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [command, "serve", str(demo_model_paths().base), *options],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
    found, deadline = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
    try:
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            try:
                if httpx2.get(f"{found}/health").is_success:
                    break
            except httpx2.TransportError:
                time.sleep(0.1)
        yield f"{found}/v1"
    finally:
        process.terminate()
        process.wait(PATIENCE)


@pytest.mark.long
def test_a_search_over_transformers_serve(url: str) -> None:
    """It ignores n, takes top_k in a field of its own, and has no chat template for this model."""
    models = demo_model_paths()
    name = str(models.base)
    with probed_once():
        # One at a time: the seed of a request is that of its whole process.
        e = Engine(
            base=RemoteBase(url, model=name, max_concurrency=1),
            guides=Guide(tuned=str(models.tuned), untuned=str(models.untuned)),
            device="cpu",
        )
    assert e.server == f"{url} (model {name}): texts"
    with pytest.warns(UserWarning, match=r"gives 1 of \d samples \(n\)"):
        (result,) = e.generate([PROMPT], SEARCH)
    check(result, SEARCH)
    assert result.error is None and result.trace is not None
    # Left to itself it would draw nothing, and all would be the likeliest text.
    assert len({c.text for c in result.trace.rounds[0].candidates}) > 1
    assert len(result.trace.rounds) == 3 or result.finish_reason == "eos"
    for r in result.trace.rounds:  # scored as texts that are given
        going_on = [c for c in r.candidates if c.finish_reason is None]
        scores = e.score([PROMPT] * len(going_on), [c.text or "" for c in going_on])
        assert scores == pytest.approx([c.score for c in going_on], abs=1e-3)
        best = sorted(range(len(r.candidates)), key=lambda i: -(r.candidates[i].score or 0.0))
        assert r.kept == best[:2]
    # Its greedy text in chunks is what it writes at once.
    greedy = replace(SEARCH, method="sample", temperature=0.0)
    (whole,) = e.generate([PROMPT], greedy)
    (chunked,) = e.generate([PROMPT], replace(greedy, method="cbs", dedup=True))
    body = {"model": name, "prompt": PROMPT, "max_tokens": 15, "temperature": 0}
    theirs = httpx2.post(f"{url}/completions", json=body, timeout=60).json()
    assert whole.text == chunked.text == theirs["choices"][0]["text"]
    assert whole.usage.remote is not None
    assert whole.usage.remote.completion_tokens == theirs["usage"]["completion_tokens"]
    assert whole.usage.prompt_tokens == theirs["usage"]["prompt_tokens"]
    (again,) = e.generate([PROMPT], SEARCH)
    assert [h.text for h in again.hypotheses] == [h.text for h in result.hypotheses]
    with pytest.raises(RemoteFailure, match="Server is pinned to"):
        Engine(base=RemoteBase(url, model="another"), device="cpu")
