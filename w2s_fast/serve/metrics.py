"""What Prometheus reads, in vLLM's words where it has one; the prefix is ``w2s:``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from w2s_fast.result import SearchResult
from w2s_fast.stats import EngineStats

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_LABEL = ("model_name",)


class _OfEngine(Collector):
    """What the engine knows by itself, read when somebody asks."""

    def __init__(self, name: str, stats: Callable[[], EngineStats]) -> None:
        self._name = name
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        gauges: dict[str, tuple[str, float]] = {
            "num_requests_running": ("Requests that take part in steps.", stats.running),
            "num_requests_waiting": ("Requests that wait for room.", stats.waiting),
        }
        for name, (help, value) in gauges.items():
            gauge = GaugeMetricFamily(f"w2s:{name}", help, labels=_LABEL)
            gauge.add_metric([self._name], value)
            yield gauge
        counters: dict[str, tuple[str, float]] = {
            "num_preemptions": ("Times that a request was set aside.", stats.set_aside),
            "steps": ("Steps of the engine.", stats.steps),
            "rounds": ("Selections of single requests.", stats.rounds),
            "rows": ("Rows of all passes of the base.", stats.rows),
            "passes": ("Passes of the base.", stats.passes),
            "sampled_tokens": ("Tokens sampled, those of losers too.", stats.sampled_tokens),
            "scored_tokens": ("Tokens scored by each guide.", stats.scored_tokens),
            "busy_seconds": ("Seconds within steps.", stats.busy_s),
        }
        for name, (help, value) in counters.items():
            counter = CounterMetricFamily(f"w2s:{name}", help, labels=_LABEL)
            counter.add_metric([self._name], value)
            yield counter
        labels = (*_LABEL, "model")
        use = GaugeMetricFamily(
            "w2s:kv_cache_usage_perc", "Share of a model's pages in use, 0 to 1.", labels=labels
        )
        queries = CounterMetricFamily(
            "w2s:prefix_cache_queries", "Prompt tokens looked for in the cache.", labels=labels
        )
        hits = CounterMetricFamily(
            "w2s:prefix_cache_hits", "Those of them that were found.", labels=labels
        )
        for model, pool in stats.pools.items():
            own = [self._name, model.split(" (")[0]]
            use.add_metric(own, pool.used_pages / pool.num_pages)
            queries.add_metric(own, pool.cache_lookup_tokens)
            hits.add_metric(own, pool.cache_hit_tokens)
        yield from (use, queries, hits)


class Watched:
    """One request, from its arrival on."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._begin = self._last = time.perf_counter()
        self._told = 0

    def piece(self, tokens: int) -> None:
        """So many tokens have been told the client."""
        now = time.perf_counter()
        if tokens:
            if self._told == 0:
                self._metrics.first_token.observe(now - self._begin)
            else:
                self._metrics.between_tokens.observe((now - self._last) / tokens)
            self._told += tokens
            self._last = now

    def ended(self, result: SearchResult) -> None:
        self._metrics.add(result, time.perf_counter() - self._begin)


class Metrics:
    """Everything that is counted; of one server."""

    def __init__(self, name: str, stats: Callable[[], EngineStats]) -> None:
        """``name``: of the base, a label of all of them."""
        self._registry = CollectorRegistry()
        self._registry.register(_OfEngine(name, stats))
        self._name = name

        def histogram(suffix: str, help: str) -> Histogram:
            made = Histogram(
                f"w2s:{suffix}", help, _LABEL, buckets=_SECONDS, registry=self._registry
            )
            return made.labels(name)

        def counter(suffix: str, help: str) -> Counter:
            return Counter(f"w2s:{suffix}", help, _LABEL, registry=self._registry).labels(name)

        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self.generation_tokens = counter("generation_tokens", "Tokens of answers.")
        self.kept = counter("candidates_kept", "Candidates that a selection kept.")
        self.pruned = counter("candidates_pruned", "Candidates that a selection gave up.")
        self.first_token = histogram(
            "time_to_first_token_seconds", "Until something is certain, of streams."
        )
        self.between_tokens = histogram(
            "inter_token_latency_seconds", "Between tokens that become certain, of streams."
        )
        self.end_to_end = histogram("e2e_request_latency_seconds", "From arrival to answer.")
        self.queue = histogram("request_queue_time_seconds", "Waiting for room.")
        self.prefill = histogram("request_prefill_time_seconds", "Passes that read prompts.")
        self.decode = histogram("request_decode_time_seconds", "Passes that write.")
        self.scoring = histogram("request_scoring_time_seconds", "The guides, and selections.")
        self._success = Counter(
            "w2s:request_success",
            "Requests that ended with an answer.",
            (*_LABEL, "finished_reason"),
            registry=self._registry,
        )
        self._failure = Counter(
            "w2s:request_failure",
            "Requests that did not.",
            (*_LABEL, "error"),
            registry=self._registry,
        )

    @contextmanager
    def request(self) -> Iterator[Watched]:
        """For the time that one is under way."""
        try:
            yield Watched(self)
        except BaseException as error:
            self._failure.labels(self._name, type(error).__name__).inc()
            raise

    def add(self, result: SearchResult, seconds: float) -> None:
        reason = {"eos": "stop"}.get(result.finish_reason, result.finish_reason)
        self._success.labels(self._name, reason).inc()
        self.prompt_tokens.inc(result.usage.prompt_tokens)
        self.generation_tokens.inc(result.usage.completion_tokens)
        self.end_to_end.observe(seconds)
        if result.stats is not None:
            self.queue.observe(result.stats.queue_s)
            self.prefill.observe(result.stats.prefill_s)
            self.decode.observe(result.stats.decode_s)
            self.scoring.observe(result.stats.scoring_s)
            self.kept.inc(result.stats.kept)
            self.pruned.inc(result.stats.candidates - result.stats.kept)

    def render(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
