"""Every metric of the service: its name, kind, labels and buckets are written here and nowhere else.

Each process has a registry of its own and pushes what it holds to the hub every second; any ingress
answers `GET /metrics` for the whole service. The `replica` label tells the processes apart.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serve_app.engine.engine import Engine
from serve_app.types import Chunk, FinishReason, GenerationRequest

# A second series for every counter, which nothing here reads.
disable_created_metrics()  # type: ignore[no-untyped-call]

# Seconds. Fine where objectives lie (TTFT 0.5, 2 and 5 s; TPOT 50 ms), coarse elsewhere.
_TTFT = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60)
_TPOT = (0.0025, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.2, 0.5, 1)
_QUEUE = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60)
_REQUEST = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

# How a request ended that has all of its answer, beside its finish reason.
EMBEDDED = "embedded"
FINISHED = frozenset({*(reason.value for reason in FinishReason), EMBEDDED})


class IngressMetrics:
    """What callers see, measured at the ingress: from a request's arrival to its last token."""

    def __init__(self, replica: str) -> None:
        self._registry = registry = CollectorRegistry()
        self._replica = replica
        labels = ("model", "replica")
        self._requests = Counter(
            "serve_app_requests", "Requests by how they ended", (*labels, "outcome"), registry=registry
        )
        self._errors = Counter(
            "serve_app_errors", "Requests answered with an error, by kind", (*labels, "code"), registry=registry
        )
        self._active = Gauge(
            "serve_app_active_requests", "Requests under way, waiting ones included", labels, registry=registry
        )
        self._prompt_tokens = Counter(
            "serve_app_prompt_tokens", "Tokens of admitted prompts", labels, registry=registry
        )
        self._tokens = Counter("serve_app_generated_tokens", "Tokens sent to callers", labels, registry=registry)
        self._ttft = Histogram(
            "serve_app_time_to_first_token_seconds",
            "Arrival to first token",
            labels,
            buckets=_TTFT,
            registry=registry,
        )
        self._tpot = Histogram(
            "serve_app_time_per_output_token_seconds",
            "Mean time of the tokens after the first",
            labels,
            buckets=_TPOT,
            registry=registry,
        )
        self._queue = Histogram(
            "serve_app_queue_seconds",
            "Arrival to the model's beginning",
            labels,
            buckets=_QUEUE,
            registry=registry,
        )
        self._duration = Histogram(
            "serve_app_request_seconds", "Arrival to last token", labels, buckets=_REQUEST, registry=registry
        )

    def families(self) -> list[Metric]:
        return list(self._registry.collect())

    def began(self, request: GenerationRequest) -> None:
        self._active.labels(request.model, self._replica).inc()

    def first(self, request: GenerationRequest, chunk: Chunk) -> None:
        labels = request.model, self._replica
        if chunk.events:
            self._ttft.labels(*labels).observe(chunk.events[0].elapsed_s)
        self._queue.labels(*labels).observe(chunk.queue_s)
        self._prompt_tokens.labels(*labels).inc(chunk.prompt_tokens)

    def tokens(self, request: GenerationRequest) -> Counter:
        """The counter of its tokens, which is looked up once for all of them."""
        return self._tokens.labels(request.model, self._replica)

    def ended(self, request: GenerationRequest, outcome: str, tokens: int, ttft_s: float, elapsed_s: float) -> None:
        """`outcome` is one of FINISHED, whose times matter, `cancelled`, or an error's code."""
        labels = request.model, self._replica
        self._active.labels(*labels).dec()
        self._requests.labels(*labels, outcome).inc()
        if outcome in FINISHED:
            self._duration.labels(*labels).observe(elapsed_s)
            if tokens > 1:
                self._tpot.labels(*labels).observe((elapsed_s - ttft_s) / (tokens - 1))

    def refused(self, code: str, model: str) -> None:
        self._errors.labels(model, self._replica, code).inc()


class EngineMetrics:
    """What one engine does, read from it whenever somebody looks."""

    def __init__(self, model: str, replica: str, engine: Engine) -> None:
        self._labels = [model, replica]
        self._engine = engine

    def families(self) -> list[Metric]:
        stats = self._engine.stats()
        gauges = {
            "running_sequences": ("Sequences in a slot", stats.running),
            "queue_depth": ("Sequences waiting for a slot", stats.waiting),
            "slots": ("Slots of the KV arena", stats.slots),
            "kv_usage_ratio": (
                "Share of the KV memory that running sequences' tokens take",
                stats.tokens_held / stats.arena_tokens,
            ),
        }
        counters = {
            "engine_steps": ("Forward passes", stats.steps),
            "engine_failed_steps": ("Forward passes that failed", stats.failed_steps),
            "engine_rows": ("Rows of all forward passes; by engine_steps the mean batch size", stats.rows),
            "engine_decode_rows": ("Decoding rows of all forward passes", stats.decode_rows),
            "engine_generated_tokens": ("Tokens sampled, whether or not somebody read them", stats.generated_tokens),
            "engine_busy_seconds": ("Time spent in steps", stats.busy_s),
            "engine_preemptions": ("Sequences put off because memory ran out, to be computed again", stats.preemptions),
            "prefix_cache_queried_tokens": ("Prompt tokens that came to a slot", stats.prompt_tokens),
            "prefix_cache_hit_tokens": ("Of them, those that were computed already", stats.cached_tokens),
            "draft_tokens": ("Tokens guessed ahead", stats.drafted),
            "draft_accepted_tokens": ("Of them, those that were right", stats.accepted),
        }
        kinds = ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters))
        info = GaugeMetricFamily("serve_app_runner_info", "How steps run", labels=["model", "replica", "kind"])
        info.add_metric([*self._labels, self._engine.kind], 1)
        return [info, *(self._family(kind, *entry) for kind, table in kinds for entry in table.items())]

    def _family(
        self, kind: type[GaugeMetricFamily | CounterMetricFamily], name: str, entry: tuple[str, float]
    ) -> Metric:
        text, value = entry
        family = kind(f"serve_app_{name}", text, labels=["model", "replica"])
        family.add_metric(self._labels, value)
        return family


class _Merged(Collector):
    """Families of several processes, those of the same name joined."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        by_name: dict[str, Metric] = {}
        for family in self._families:
            known = by_name.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            known.samples.extend(family.samples)
        return by_name.values()


def exposition(families: Iterable[Metric]) -> bytes:
    """Prometheus' text format of families from any number of processes."""
    registry = CollectorRegistry()
    registry.register(_Merged(list(families)))
    return generate_latest(registry)
