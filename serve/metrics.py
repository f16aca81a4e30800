"""Counts for Prometheus, under vLLM's names where vLLM has them."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from v4jax.engine.request import Usage

_LABEL = ("model_name",)
_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)
# Fields of the engine's counts that only grow, and vLLM's names of them.
_COUNTERS = {
    "prompt_tokens": ("vllm:prompt_tokens", "vllm:prefix_cache_queries"),
    "cached_tokens": ("vllm:prefix_cache_hits",),
    "generated_tokens": ("vllm:generation_tokens",),
    "drafted_tokens": ("vllm:spec_decode_num_draft_tokens",),
    "accepted_tokens": ("vllm:spec_decode_num_accepted_tokens",),
    "preemptions": ("vllm:num_preemptions",),
    "corrupted": ("vllm:corrupted_requests",),
    **{name: (f"v4jax:{name}",) for name in ("steps", "chunks", "recompilations")},
}
# vLLM's names of other fields; the rest keep theirs, after "v4jax:".
_GAUGES = {
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "page_usage": "vllm:kv_cache_usage_perc",
}
_TIMES = {
    "queued_seconds": ("vllm:request_queue_time_seconds", "From submission to admission."),
    "first_token_seconds": ("vllm:time_to_first_token_seconds", "From submission to a token."),
    "seconds": ("vllm:e2e_request_latency_seconds", "From submission to the end."),
}


class Metrics:
    """The counts of a server."""

    def __init__(self, model: str, stats: Callable[[], Any]) -> None:
        """`stats` returns the engine's present counts, as a dataclass of numbers."""
        self.registry = CollectorRegistry()
        self.registry.register(_EngineStats(model, stats))

        def histogram(name: str, text: str) -> Histogram:
            family = Histogram(name, text, _LABEL, registry=self.registry, buckets=_SECONDS)
            return family.labels(model)

        self._times = {n: histogram(*row) for n, row in _TIMES.items()}
        self._gaps = histogram("vllm:inter_token_latency_seconds", "Between tokens of an answer.")
        ended = ("vllm:request_success", "Ended requests.", (*_LABEL, "finished_reason"))
        self._ended = Counter(*ended, registry=self.registry)
        calls = ("v4jax:malformed_calls", "Calls that were not well-formed.", _LABEL)
        self._malformed = Counter(*calls, registry=self.registry).labels(model)
        responses = ("v4jax:http_responses", "HTTP responses.", ("status",))
        self.responses = Counter(*responses, registry=self.registry)
        self._model = model

    def ended(self, usage: Usage, finish: str) -> None:
        """Count a request that has ended; a cancelled one has no times."""
        self._ended.labels(self._model, finish).inc()
        if finish == "abort":
            return
        for name, times in self._times.items():
            times.observe(getattr(usage, name))
        if usage.completion_tokens > 1:
            decoding = usage.seconds - usage.first_token_seconds
            self._gaps.observe(decoding / (usage.completion_tokens - 1))

    def malformed(self, calls: int) -> None:
        """Count calls that the parser had to mend."""
        self._malformed.inc(calls)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineStats(Collector):
    """The engine's own counts, read when they are asked for."""

    def __init__(self, model: str, stats: Callable[[], Any]) -> None:
        self._model, self._stats = model, stats

    def collect(self) -> Iterator[Metric]:
        for field, value in dataclasses.asdict(self._stats()).items():
            family = CounterMetricFamily if field in _COUNTERS else GaugeMetricFamily
            gauge = _GAUGES.get(field, f"v4jax:{field}")
            for name in _COUNTERS.get(field, (gauge,)):
                metric = family(name, f"The engine's {field}.", labels=_LABEL)
                metric.add_metric((self._model,), float(value))
                yield metric
