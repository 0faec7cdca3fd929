"""Prometheus metrics in a registry of our own: the engine's counters as of its last message, and what clients felt.

Labels are few and bounded: never a session, a request or a user.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from agentserve.messages import Stats
from agentserve.session.misses import REASONS

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FIRST = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_BETWEEN = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_WHOLE = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)

_GAUGES = {
    "num_requests_running": ("Requests in the engine's steps.", lambda s: s.running),
    "num_requests_waiting": ("Requests queued in the engine.", lambda s: s.waiting),
    "kv_cache_usage": ("Share of KV pages that are not free (0 to 1).", lambda s: 1 - s.pages_free / s.pages_total),
    "weight_version": ("Version of the weights that sample now.", lambda s: s.weight_version),
}
_COUNTERS = {
    "prompt_tokens": ("Prompt tokens of ended requests.", lambda s: s.prompt_tokens),
    "cached_tokens": ("Prompt tokens of ended requests that the cache held.", lambda s: s.cached_tokens),
    "computed_tokens": ("Tokens that steps computed.", lambda s: s.computed_tokens),
    "generation_tokens": ("Tokens sampled.", lambda s: s.generated_tokens),
    "engine_steps": ("Steps of the engine.", lambda s: s.steps),
    "retractions": ("Running requests put back to waiting for want of pages.", lambda s: s.retractions),
    "evicted_pages": ("Cached pages evicted.", lambda s: s.evicted_pages),
    "step_seconds": ("Seconds that steps took.", lambda s: s.step_seconds),
    "overlap_wait_seconds": ("Seconds that the engine's loop waited for a step.", lambda s: s.overlap_wait_seconds),
}


class _EngineCollector(Collector):
    """Reads the engine's latest stats when scraped, so that nothing is counted twice or late."""

    def __init__(self, latest: Callable[[], Stats | None]) -> None:
        self._latest = latest

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        stats = self._latest()
        if stats is None:
            return
        for name, (text, value) in _GAUGES.items():
            yield GaugeMetricFamily(f"agentserve:{name}", text, value(stats))
        pages = GaugeMetricFamily("agentserve:kv_cache_pages", "KV pages by owner.", labels=["owner"])
        for owner in ("free", "cached", "held", "retiring"):
            pages.add_metric([owner], getattr(stats, f"pages_{owner}"))
        yield pages
        for name, (text, value) in _COUNTERS.items():
            yield CounterMetricFamily(f"agentserve:{name}", text, value(stats))


class Metrics:
    """What one server measures.

    Args:
        latest: the engine's latest stats, or None before the first.
        sessions: how many sessions are open.
        healthy: whether the engine is alive.
    """

    def __init__(
        self, latest: Callable[[], Stats | None], sessions: Callable[[], int], healthy: Callable[[], bool]
    ) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(latest))
        Gauge("agentserve:sessions_open", "Open sessions.", registry=self.registry).set_function(sessions)
        Gauge("agentserve:healthy", "1 while the engine is alive.", registry=self.registry).set_function(healthy)
        self.finished = Counter(
            "agentserve:request_success",
            "Ended requests by how: stop, length, abort, error.",
            ["finished_reason"],
            registry=self.registry,
        )
        self._missed = Counter(
            "agentserve:prompt_tokens_missed",
            "Prompt tokens of sessions' turns that had to be computed, by reason.",
            ["reason"],
            registry=self.registry,
        )
        for reason in REASONS:
            self._missed.labels(reason)
        self.first_token = self._histogram("time_to_first_token_seconds", "From a request to its first token.", _FIRST)
        self.between = self._histogram("inter_token_latency_seconds", "Between two outputs of a request.", _BETWEEN)
        self.whole = self._histogram("e2e_request_latency_seconds", "From a request to its end.", _WHOLE)

    def miss(self, tokens: Mapping[str, int]) -> None:
        """Count a turn's computed prompt tokens by reason."""
        for reason, count in tokens.items():
            self._missed.labels(reason).inc(count)

    def expose(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"agentserve:{name}", text, buckets=buckets, registry=self.registry)
