"""OpenTelemetry: a span a request, one a round, and a caller's own trace goes on with them."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2
import pytest

pytest.importorskip("opentelemetry.sdk")

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.support.servers import Running
from w2s_fast.serve import spans

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(spans, "_tracer", provider.get_tracer("test"))
    yield exporter
    provider.shutdown()


@pytest.mark.parametrize("stream", [False, True])
def test_a_span_a_request_and_one_a_round(
    server: Running, http: httpx2.Client, exported: InMemorySpanExporter, stream: bool
) -> None:
    body = {"prompt": "ab", "seed": 5, "stream": stream}
    headers = {"traceparent": PARENT}
    answer = http.post("/v1/completions", json=body, headers=headers)
    assert answer.status_code == 200
    *rounds, request = exported.get_finished_spans()
    assert request.name == "text_completion tiny" and request.kind is trace.SpanKind.SERVER
    attributes = dict(request.attributes or {})
    assert attributes["gen_ai.request.model"] == "tiny"
    assert attributes["gen_ai.request.seed"] == 5
    assert attributes["gen_ai.usage.input_tokens"] == 3
    plain = http.post("/v1/completions", json={**body, "stream": False}).json()
    assert attributes["gen_ai.usage.output_tokens"] == plain["usage"]["completion_tokens"]
    assert len(rounds) == plain["w2s"]["rounds"]
    for number, span in enumerate(rounds, 1):
        assert dict(span.attributes or {})["w2s.round"] == number
        assert span.parent is not None and span.parent.span_id == request.context.span_id
        assert span.start_time <= span.end_time
    assert f"{request.context.trace_id:032x}" == TRACE


def test_a_request_that_fails_says_so(http: httpx2.Client, exported: InMemorySpanExporter) -> None:
    assert http.post("/v1/completions", json={"prompt": "a" * 300}).status_code == 400
    (span,) = exported.get_finished_spans()
    assert span.status.status_code is trace.StatusCode.ERROR
    assert span.events[0].name == "exception"
