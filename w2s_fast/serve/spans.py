"""Spans of OpenTelemetry, where its API is installed: one a request, and one a round within it.

Names and attributes are those of its conventions for generative AI (``gen_ai.*``). Without a
tracer that somebody has set up, spans cost nothing and go nowhere.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from w2s_fast.params import SearchParams
from w2s_fast.result import Round, SearchResult

try:
    from opentelemetry import propagate, trace
except ModuleNotFoundError:
    _tracer = None
else:
    _tracer = trace.get_tracer("w2s_fast.serve")


# Headers of the HTTP request that is being answered: a caller's own trace goes on with it.
REQUEST_ID: ContextVar[str] = ContextVar("REQUEST_ID", default="")
INCOMING: ContextVar[Mapping[str, str]] = ContextVar("INCOMING", default=MappingProxyType({}))


class RequestSpan:
    """One request, from its arrival to its answer; nothing where there is no tracer."""

    def __init__(self, span: Any) -> None:
        self._span = span
        self._last = time.time_ns()
        self._rounds = 0

    @property
    def records(self) -> bool:
        """Whether anybody will see it: then rounds are worth telling."""
        return self._span is not None and bool(self._span.is_recording())

    def round(self, ended: Round) -> None:
        """A round has ended; it began where the one before it did."""
        if _tracer is None or not self.records:
            return
        now = time.time_ns()
        self._rounds += 1
        attributes = {
            "w2s.round": self._rounds,
            "w2s.candidates": len(ended.candidates),
            "w2s.kept": len(ended.kept),
        }
        context = trace.set_span_in_context(self._span)
        span = _tracer.start_span("round", context, start_time=self._last, attributes=attributes)
        span.end(now)
        self._last = now

    def ended(self, result: SearchResult) -> None:
        if not self.records:
            return
        reasons = tuple(hypothesis.finish_reason for hypothesis in result.hypotheses)
        self._span.set_attributes(
            {
                "gen_ai.response.finish_reasons": reasons,
                "gen_ai.usage.input_tokens": result.usage.prompt_tokens,
                "gen_ai.usage.output_tokens": result.usage.completion_tokens,
                "w2s.sampled_tokens": result.usage.sampled_tokens,
                "w2s.scored_tokens": result.usage.scored_tokens,
            }
        )


@contextmanager
def request_span(model: str, params: SearchParams) -> Iterator[RequestSpan]:
    """For the time of a request."""
    if _tracer is None:
        yield RequestSpan(None)
        return
    attributes: dict[str, Any] = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "w2s-fast",
        "gen_ai.request.model": model,
        "gen_ai.request.max_tokens": params.max_new_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_k": params.top_k,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.seed": params.seed,
        "gen_ai.request.choice.count": params.n,
        "w2s.method": params.method,
    }
    with _tracer.start_as_current_span(
        f"text_completion {model}",
        propagate.extract(INCOMING.get()),
        kind=trace.SpanKind.SERVER,
        attributes=attributes,
    ) as span:
        yield RequestSpan(span)
