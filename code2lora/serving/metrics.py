"""Count what is served, in Prometheus's text format, and tell which generation serves whom."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from code2lora.serving.adapter_cache import LoadedAdapter
from code2lora.serving.completion import Completion
from code2lora.serving.engine import Engine

_LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8)
_SWAP_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)

TEXT_FORMAT = CONTENT_TYPE_LATEST


class Metrics:
    """What one application has served. Thread-safe."""

    def __init__(
        self, engine: Callable[[], Engine | None], others: Sequence[Collector] = ()
    ) -> None:
        """Ask `engine` for its own counts whenever somebody reads; None while it loads.

        others: what is told beside them
        """
        self._registry = CollectorRegistry()
        self._live: dict[str, str] = {}
        self._lock = threading.Lock()
        self._requests = Counter(
            "code2lora_requests",
            "Requests answered, by endpoint and status.",
            ["endpoint", "status"],
            registry=self._registry,
        )
        self._first_token = Histogram(
            "code2lora_first_token_seconds",
            "From a request to its first token, the wait for a place included.",
            buckets=_LATENCY_S,
            registry=self._registry,
        )
        self._duration = Histogram(
            "code2lora_completion_seconds",
            "From a request to the end of its completion.",
            buckets=_LATENCY_S,
            registry=self._registry,
        )
        self._swaps = Counter(
            "code2lora_adapter_swaps",
            "New generations that went live, by repository.",
            ["repository"],
            registry=self._registry,
        )
        self._swap = Histogram(
            "code2lora_adapter_swap_seconds",
            "From the first request for a generation to its being ready.",
            buckets=_SWAP_S,
            registry=self._registry,
        )
        for collector in (_EngineCounts(engine, self._generations), *others):
            self._registry.register(collector)

    def answered(self, endpoint: str, status: int) -> None:
        """Count a response."""
        self._requests.labels(endpoint, str(status)).inc()

    def completed(self, done: Iterable[Completion]) -> None:
        """Note how long completions took."""
        for one in done:
            self._duration.observe(one.total_ms / 1e3)
            if one.first_token_ms is not None:
                self._first_token.observe(one.first_token_ms / 1e3)

    def live(self, adapter: LoadedAdapter) -> None:
        """Note that this is a repository's live adapter now."""
        repository, generation = adapter.identity.repository, adapter.identity.generation
        if repository is None:
            return
        with self._lock:
            before = self._live.get(repository)
            self._live[repository] = generation
        if before != generation:
            self._swaps.labels(repository).inc()
            self._swap.observe(adapter.swap_ms / 1e3)

    def text(self) -> bytes:
        """Return all of it, as Prometheus reads it."""
        return generate_latest(self._registry)

    def _generations(self) -> dict[str, str]:
        with self._lock:
            return dict(self._live)


class _EngineCounts(Collector):
    """What the engine counts itself, and the live generations."""

    def __init__(
        self, engine: Callable[[], Engine | None], generations: Callable[[], dict[str, str]]
    ) -> None:
        self._engine = engine
        self._generations = generations

    def collect(self) -> Iterable[Metric]:
        """Yield the metrics as they are now."""
        live = GaugeMetricFamily(
            "code2lora_adapter_generation",
            "The generation that answers for each repository; always 1.",
            labels=["repository", "generation"],
        )
        for repository, generation in self._generations().items():
            live.add_metric([repository, generation], 1)
        yield live
        engine = self._engine()
        yield GaugeMetricFamily(
            "code2lora_ready", "1 when the model is loaded.", engine is not None
        )
        if engine is not None:
            yield from _counts(engine)


def _counts(engine: Engine) -> Iterable[Metric]:
    stats = engine.stats
    for name, what, value in (
        ("prompt_tokens", "Tokens of prompts.", stats.n_prompt_tokens),
        ("cached_prompt_tokens", "Tokens of prompts that were remembered.", stats.n_cached_tokens),
        ("prefix_hits", "Requests whose prompt had a remembered beginning.", stats.n_prefix_hits),
        ("completion_tokens", "Tokens produced.", stats.n_tokens),
        ("cancelled", "Requests that their clients gave up.", stats.n_cancelled),
        ("passes", "Forward passes of the model.", stats.n_passes),
        ("busy_seconds", "Time spent in forward passes.", stats.busy_s),
    ):
        yield CounterMetricFamily(f"code2lora_{name}", what, value)
    yield GaugeMetricFamily("code2lora_requests_active", "Requests under way.", engine.n_active)
    yield GaugeMetricFamily(
        "code2lora_requests_waiting", "Requests that wait for a place.", engine.n_waiting
    )
    memory = GaugeMetricFamily("code2lora_cache_bytes", "Memory held by caches.", labels=["cache"])
    for cache, n_bytes in engine.memory_bytes.items():
        memory.add_metric([cache], n_bytes)
    yield memory
