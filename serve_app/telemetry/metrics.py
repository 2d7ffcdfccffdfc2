"""Every metric of the service: its name, kind, labels and buckets are written here and nowhere else.

Each process has registries of its own and pushes what they hold to the hub every second; any ingress
answers `GET /metrics` for the whole service. The `replica` label tells the processes apart.

Every label value comes from a closed set: no caller can make a series. All series of a model are there, at 0, before
its first request, because Prometheus sees no increase where a counter appears with 1.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from serve_app import __version__
from serve_app.core.events import CANCELLED, EMBEDDED, FinishReason
from serve_app.core.http import HttpCall
from serve_app.core.queries import ModelState
from serve_app.engines.native.engine import NativeEngine
from serve_app.engines.native.sequence import Step
from serve_app.errors import ServeAppError

# A second series for every counter, which nothing here reads.
disable_created_metrics()  # type: ignore[no-untyped-call]

# An answer is good when it keeps both. alerts/slo.py has the same numbers, which must be bounds of buckets.
TTFT_OBJECTIVE_S = 2.0
TPOT_OBJECTIVE_S = 0.05

# Seconds. Fine where people notice, coarse elsewhere.
_TTFT = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1, 1.5, 2, 2.5, 5, 7.5, 10, 20, 30, 60),
)
_TPOT = (
    *(0.0005, 0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.05, 0.06, 0.075),
    *(0.08, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 1, 2.5),
)
_QUEUE = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120)
_REQUEST = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_WAKE = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600)
_STEP = (0.001, 0.002, 0.005, 0.01, 0.02, 0.035, 0.05, 0.1, 0.2, 0.5, 1, 5)
_HTTP = (0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 60, 600)
# Tokens, and sequences of a step.
_LENGTH = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)

# How a request ended that has all of its answer.
FINISHED = frozenset({*(reason.value for reason in FinishReason), EMBEDDED})
CODES = ("internal_error", *(kind.code for kind in ServeAppError.__subclasses__()))
OUTCOMES = (*sorted(FINISHED), CANCELLED, *dict.fromkeys(CODES))

_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
_MODEL = ("model", "replica")


class _Series:
    """The metrics of one model in one process, in a registry of their own: each has one child, made at once.

    Whoever changes one says so by `changed`: looking at 250 samples takes 2 ms, and most models rest most of the time.
    """

    def __init__(self, model: str, replica: str) -> None:
        self._labels = (model, replica)
        self._registry = CollectorRegistry()
        self._seen: list[Metric] = []
        self.changed = True

    def families(self) -> list[Metric]:
        """The same objects as before if nothing has changed."""
        if self.changed:
            self.changed = False  # first: somebody may change something meanwhile
            self._seen = list(self._registry.collect())
        return self._seen

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"serve_app_{name}", text, _MODEL, registry=self._registry).labels(*self._labels)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"serve_app_{name}", text, _MODEL, registry=self._registry).labels(*self._labels)

    def _histogram(self, name: str, text: str, bounds: tuple[float, ...]) -> Histogram:
        whole = Histogram(f"serve_app_{name}", text, _MODEL, buckets=bounds, registry=self._registry)
        return whole.labels(*self._labels)

    def _by(self, label: str, values: Iterable[str], name: str, text: str) -> dict[str, Counter]:
        whole = Counter(f"serve_app_{name}", text, (*_MODEL, label), registry=self._registry)
        return {value: whole.labels(*self._labels, value) for value in values}


class CallerSeries(_Series):
    """What callers of one model see, measured at the ingress: from a request's arrival to its last token."""

    def __init__(self, model: str, replica: str) -> None:
        super().__init__(model, replica)
        self.requests = self._by("outcome", OUTCOMES, "requests", "Requests by how they ended")
        self.truncated = self._counter("truncated_requests", "Of them, those that broke off after their first token")
        self.good = self._counter("goodput_requests", "Of them, those answered within the objectives of TTFT and TPOT")
        self.active = self._gauge("active_requests", "Requests under way, waiting ones included")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of admitted prompts")
        self.tokens = self._counter("generated_tokens", "Tokens sent to callers")
        self.ttft = self._histogram("time_to_first_token_seconds", "Arrival to first token", _TTFT)
        self.tpot = self._histogram(
            "time_per_output_token_seconds", "Mean time of the tokens after the first, of one request", _TPOT
        )
        self.itl = self._histogram("inter_token_seconds", "From one sending of tokens to the next", _TPOT)
        self.queue = self._histogram("queue_seconds", "Arrival to the model's beginning", _QUEUE)
        self.prefill = self._histogram("prefill_seconds", "The model's beginning to the first token", _TTFT)
        self.decode = self._histogram("decode_seconds", "First token to last", _REQUEST)
        self.duration = self._histogram("request_seconds", "Arrival to last token", _REQUEST)
        self.prompt_length = self._histogram("request_prompt_tokens", "Tokens of a prompt", _LENGTH)
        self.answer_length = self._histogram("request_generated_tokens", "Tokens of a whole answer", _LENGTH)
        self.wake = self._histogram(
            "model_wake_seconds", "From the first request that found the model asleep to its being ready", _WAKE
        )


class HttpSeries:
    """HTTP calls of one ingress, whatever they were for, and what was refused."""

    def __init__(self, replica: str, models: Iterable[str]) -> None:
        self._registry = registry = CollectorRegistry()
        self._replica = replica
        self._models = frozenset(models)
        self._errors = Counter(
            "serve_app_errors", "Requests answered with an error, by kind", (*_MODEL, "code"), registry=registry
        )
        for model in ("", *self._models):
            for code in CODES:
                self._errors.labels(model, replica, code)
        self._calls = Counter(
            "serve_app_http_requests",
            "Calls by status line",
            ("route", "method", "status", "replica"),
            registry=registry,
        )
        self._seconds = Histogram(
            "serve_app_http_request_seconds", "A call's time", ("route", "replica"), buckets=_HTTP, registry=registry
        )
        self._open = Gauge("serve_app_http_open_requests", "Calls under way", ("replica",), registry=registry)
        self.open = self._open.labels(replica)
        self._received = Counter(
            "serve_app_http_received_bytes", "Bytes of bodies received", ("route", "replica"), registry=registry
        )
        self._sent = Counter(
            "serve_app_http_sent_bytes", "Bytes of bodies sent", ("route", "replica"), registry=registry
        )

    def families(self) -> list[Metric]:
        return list(self._registry.collect())

    def refused(self, code: str, model: str) -> None:
        self._errors.labels(model if model in self._models else "", self._replica, code).inc()

    def ended(self, call: HttpCall) -> None:
        method = call.method if call.method in _METHODS else "other"
        status = "left" if call.status is None else f"{call.status // 100}xx"
        self._calls.labels(call.route, method, status, self._replica).inc()
        labels = call.route, self._replica
        self._seconds.labels(*labels).observe(call.seconds)
        self._received.labels(*labels).inc(call.received)
        self._sent.labels(*labels).inc(call.sent)


class GenAiSeries:
    """The same times by OpenTelemetry's names for generative AI, with the buckets that it advises.

    https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-metrics/
    """

    _LABELS = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model", "replica")
    _DURATION = tuple(0.01 * 2**n for n in range(14))
    _TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
    _TPOT = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)

    def __init__(self, replica: str) -> None:
        self._registry = CollectorRegistry()
        self._replica = replica
        self._duration = Histogram(
            "gen_ai_server_request_duration_seconds",
            "Arrival to last token, or to the error",
            (*self._LABELS, "error_type"),
            buckets=self._DURATION,
            registry=self._registry,
        )
        self._ttft = self._histogram("time_to_first_token", "Arrival to first token", self._TTFT)
        self._tpot = self._histogram("time_per_output_token", "Mean time of the tokens after the first", self._TPOT)

    def families(self) -> list[Metric]:
        return list(self._registry.collect())

    def ended(
        self, model: str, operation: str, error: str, seconds: float, ttft_s: float | None, tpot_s: float | None
    ) -> None:
        """`error` is "" for an answer; a time is None where there was none."""
        labels = operation, "serve_app", model, self._replica
        self._duration.labels(*labels, error).observe(seconds)
        if ttft_s is not None:
            self._ttft.labels(*labels).observe(ttft_s)
        if tpot_s is not None:
            self._tpot.labels(*labels).observe(tpot_s)

    def _histogram(self, name: str, text: str, bounds: tuple[float, ...]) -> Histogram:
        name = f"gen_ai_server_{name}_seconds"
        return Histogram(name, text, self._LABELS, buckets=bounds, registry=self._registry)


class StepSeries(_Series):
    """What one engine's steps were like. `saw` is called on the engine's thread."""

    def __init__(self, model: str, replica: str) -> None:
        super().__init__(model, replica)
        self._size = self._histogram("engine_batch_size", "Sequences that a step advanced", _ROWS)
        self._tokens = self._histogram("engine_batch_tokens", "Rows of a step", _ROWS)
        seconds = Histogram(
            "serve_app_engine_step_seconds",
            "A step's time, by what its sequences did",
            (*_MODEL, "phase"),
            buckets=_STEP,
            registry=self._registry,
        )
        phases = ("prefill", "decode", "mixed")
        self._seconds = {phase: seconds.labels(model, replica, phase) for phase in phases}

    def saw(self, step: Step, seconds: float) -> None:
        self._size.observe(len(step.advances))
        self._tokens.observe(step.rows)
        decoding = sum(advance.count == 1 for advance in step.advances)
        phase = "decode" if decoding == len(step.advances) else "mixed" if decoding else "prefill"
        self._seconds[phase].observe(seconds)
        self.changed = True


class EngineMetrics:
    """What one engine does, read from it whenever somebody looks."""

    def __init__(self, model: str, replica: str, engine: NativeEngine, load_s: float) -> None:
        self._labels = [model, replica]
        self._engine = engine
        self._load_s = load_s

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
            "engine_step_age_seconds": ("How long the step under way has taken so far", self._engine.step_age()),
            "model_load_seconds": ("From the replica's beginning to its being ready", self._load_s),
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
        info = _gauge(
            "runner_info",
            "The path on which a model runs and the quantization of its weights",
            ("model", "replica", "kind", "quantization"),
        )
        info.add_metric([*self._labels, self._engine.kind, self._engine.quantization], 1)
        families: list[Metric] = [info]
        for name, (text, value) in gauges.items():
            gauge = _gauge(name, text, _MODEL)
            gauge.add_metric(self._labels, value)
            families.append(gauge)
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(f"serve_app_{name}", text, labels=_MODEL)
            counter.add_metric(self._labels, value)
            families.append(counter)
        return families


def states(models: Iterable[tuple[str, ModelState, int]]) -> list[Metric]:
    """Of each model its name, state, and number of replicas that can answer."""
    state = _gauge("model_state", "1 for the state that the model is in", ("model", "state"))
    ready = _gauge("ready_replicas", "Replicas that can answer", ("model",))
    for name, now, replicas in models:
        ready.add_metric([name], replicas)
        for one in ModelState:
            state.add_metric([name, one.value], one is now)
    return [state, ready]


def ages(seconds: Iterable[tuple[str, str, float]]) -> list[Metric]:
    """Of each process its model ("" for an ingress), replica, and how long ago it pushed."""
    age = _gauge("snapshot_age_seconds", "How long ago a process said what it measures", _MODEL)
    for model, replica, since in seconds:
        age.add_metric([model, replica], since)
    return [age]


def hub_up(up: bool) -> Metric:
    family = _gauge("metrics_hub_up", "Whether this is of all processes; 0: of the one that answers only", ())
    family.add_metric([], up)
    return family


def build(model: str, replica: str) -> Metric:
    """What a process runs on."""
    packages = ("ray", "torch", "transformers")
    family = _gauge("build_info", "What a process runs on", (*_MODEL, "version", "python", *packages))
    versions = [__version__, platform.python_version(), *map(_version, packages)]
    family.add_metric([model, replica, *versions], 1)
    return family


def lag(model: str, replica: str, seconds: float) -> Metric:
    family = _gauge("event_loop_lag_seconds", "How late a process's event loop was at its last look", _MODEL)
    family.add_metric([model, replica], seconds)
    return family


def gpu() -> dict[str, GaugeMetricFamily]:
    """Of GPUs, by label `gpu` (NVML's UUID) on `node` (a host name): what all their processes take."""
    texts = {
        "memory_used_bytes": "Memory in use",
        "memory_total_bytes": "Memory",
        "utilization_ratio": "Share of the time in which a kernel ran",
    }
    return {name: _gauge(f"gpu_{name}", text, (*_MODEL, "node", "gpu")) for name, text in texts.items()}


def _gauge(name: str, text: str, labels: tuple[str, ...]) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"serve_app_{name}", text, labels=labels)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
