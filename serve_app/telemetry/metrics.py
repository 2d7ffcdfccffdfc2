"""Defines every metric of the service: its name, type, labels, buckets and HELP text.

Each process has its own registries and reports their content to every ingress once per second. Any ingress answers
`GET /metrics` for the whole service. The label `replica` identifies the process; `model` is "" for an ingress.

Every label value comes from a closed set, so that no request creates a series. All series of a model exist, with the
value 0, before its first request, because Prometheus sees no increase in a counter that first appears with the value 1.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from functools import partial
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from serve_app import __version__
from serve_app.core.cache_status import CacheStatus
from serve_app.core.events import CANCELLED, EMBEDDED, FinishReason
from serve_app.core.http import HttpCall
from serve_app.core.queries import ModelState
from serve_app.core.tenants import REASONS, Limits
from serve_app.engines.native.sequence import Step
from serve_app.engines.protocol import ReplicaEngine, StepStats
from serve_app.errors import ServeAppError

# They would add a second series for every counter, with its creation time.
disable_created_metrics()  # type: ignore[no-untyped-call]

# A response that meets both objectives counts as goodput. alerts/slo.py has the same values, and each of them must be a
# bucket bound of its histogram.
TTFT_OBJECTIVE_S = 2.0
TPOT_OBJECTIVE_S = 0.05

# Bucket bounds in seconds: close together where users notice a difference.
TTFT_BOUNDS = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1, 1.5, 2, 2.5, 5, 7.5, 10, 20, 30, 60),
)
TPOT_BOUNDS = (
    *(0.0005, 0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.05, 0.06, 0.075),
    *(0.08, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 1, 2.5),
)
_QUEUE = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120)
_REQUEST = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_WAKE = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600)
_STEP = (0.001, 0.002, 0.005, 0.01, 0.02, 0.035, 0.05, 0.1, 0.2, 0.5, 1, 5)
_HTTP = (0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 60, 600)
# Bucket bounds in tokens, and in sequences of a step.
_LENGTH = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)

# The outcomes of a request with a complete response.
FINISHED = frozenset({*(reason.value for reason in FinishReason), EMBEDDED})
CODES = ("internal_error", *(kind.code for kind in ServeAppError.__subclasses__()))
OUTCOMES = (*sorted(FINISHED), CANCELLED, *dict.fromkeys(CODES))

_RUNNER_INFO = "How the engine computes its steps, by kind: fused, transformers, toy or vllm; the value is always 1."
_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
_MODEL = ("model", "replica")


class _Series:
    """The metrics of one model in one process, in their own registry. Each label set exists from the beginning.

    The code that changes a metric sets `changed`: collecting 250 samples takes 2 ms, and most models are idle most of
    the time.
    """

    def __init__(self, model: str, replica: str) -> None:
        self._labels = (model, replica)
        self._registry = CollectorRegistry()
        self._collected: list[Metric] = []
        self.changed = True

    def families(self) -> list[Metric]:
        """The metric families; the same objects as in the last call if nothing has changed since."""
        if self.changed:
            self.changed = False  # first, because another thread may change a metric meanwhile
            self._collected = list(self._registry.collect())
        return self._collected

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"serve_app_{name}", text, _MODEL, registry=self._registry).labels(*self._labels)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"serve_app_{name}", text, _MODEL, registry=self._registry).labels(*self._labels)

    def _histogram(self, name: str, text: str, bounds: tuple[float, ...]) -> Histogram:
        family = Histogram(f"serve_app_{name}", text, _MODEL, buckets=bounds, registry=self._registry)
        return family.labels(*self._labels)

    def _counters(self, name: str, text: str, label: str, values: Iterable[str]) -> dict[str, Counter]:
        """One counter for each value of an additional label."""
        family = Counter(f"serve_app_{name}", text, (*_MODEL, label), registry=self._registry)
        return {value: family.labels(*self._labels, value) for value in values}


class RequestSeries(_Series):
    """The requests for one model, measured at an ingress from the arrival of a request to its last token."""

    def __init__(self, model: str, replica: str) -> None:
        super().__init__(model, replica)
        self.requests = self._counters(
            "requests",
            "Requests that have ended, by outcome: a finish reason, 'embedded' for an embedding, 'cancelled', or an "
            "error code.",
            "outcome",
            OUTCOMES,
        )
        self.truncated = self._counter(
            "truncated_requests", "Requests that ended with an error after their first token."
        )
        self.resumed = self._counter(
            "resumed_requests",
            "Requests that were sent to another replica because the replica that served them was lost.",
        )
        self.good = self._counter(
            "goodput_requests",
            f"Requests with a complete response, a TTFT of at most {TTFT_OBJECTIVE_S:g} s and a TPOT of at most "
            f"{TPOT_OBJECTIVE_S:g} s.",
        )
        self.active = self._gauge("active_requests", "Requests in progress, including requests that wait.")
        self.prompt_tokens = self._counter(
            "prompt_tokens", "Prompt tokens of requests with a first token or an embedding."
        )
        self.tokens = self._counter("generated_tokens", "Generated tokens sent to clients.")
        self.ttft = self._histogram(
            "time_to_first_token_seconds", "TTFT: time from the arrival of a request to its first token.", TTFT_BOUNDS
        )
        self.tpot = self._histogram(
            "time_per_output_token_seconds",
            "TPOT: mean time per token after the first token of a complete response.",
            TPOT_BOUNDS,
        )
        self.itl = self._histogram(
            "inter_token_seconds", "ITL: time between two consecutive sends of tokens of one request.", TPOT_BOUNDS
        )
        self.queue = self._histogram(
            "queue_seconds", "Time from the arrival of a request to the start of its prefill.", _QUEUE
        )
        self.prefill = self._histogram(
            "prefill_seconds", "Time from the start of the prefill of a request to its first token.", TTFT_BOUNDS
        )
        self.decode = self._histogram(
            "decode_seconds", "Time from the first token to the last token of a complete response.", _REQUEST
        )
        self.duration = self._histogram(
            "request_seconds", "Time from the arrival of a request to the end of its complete response.", _REQUEST
        )
        self.prompt_length = self._histogram(
            "request_prompt_tokens", "Prompt tokens of a request with a complete response.", _LENGTH
        )
        self.response_length = self._histogram(
            "request_generated_tokens", "Generated tokens of a complete response.", _LENGTH
        )
        self.wake = self._histogram(
            "model_wake_seconds",
            "Time from the first request for a model that is scaled to zero until the model is ready.",
            _WAKE,
        )


class HttpSeries:
    """All HTTP calls of one ingress, the errors in its responses, and the responses that it stores."""

    def __init__(self, replica: str, models: Iterable[str]) -> None:
        self._registry = registry = CollectorRegistry()
        self._replica = replica
        self._models = frozenset(models)
        self._errors = Counter(
            "serve_app_errors",
            "Errors in responses, including errors within a stream, by error code.",
            (*_MODEL, "code"),
            registry=registry,
        )
        for model in ("", *self._models):
            for code in CODES:
                self._errors.labels(model, replica, code)
        self._auth_refusals = Counter(
            "serve_app_auth_refusals",
            "HTTP calls that were refused because of their API key or token, by reason.",
            ("replica", "reason"),
            registry=registry,
        )
        for reason in REASONS:
            self._auth_refusals.labels(replica, reason)
        self.keys_age = Gauge(
            "serve_app_keys_age_seconds",
            "Time since the process last knew that its API keys are those of the database; 0 without keys, infinite if "
            "they were never read.",
            ("replica",),
            registry=registry,
        ).labels(replica)
        self._calls = Counter(
            "serve_app_http_requests",
            "HTTP calls that have ended, by status class, for example 2xx. The class 'left' means that the client "
            "disconnected before the status was sent.",
            ("route", "method", "status", "replica"),
            registry=registry,
        )
        self._seconds = Histogram(
            "serve_app_http_request_seconds",
            "Time from the arrival of an HTTP call to the end of its response.",
            ("route", "replica"),
            buckets=_HTTP,
            registry=registry,
        )
        self._open = Gauge("serve_app_http_open_requests", "HTTP calls in progress.", ("replica",), registry=registry)
        self.open = self._open.labels(replica)
        self._received = Counter(
            "serve_app_http_received_bytes",
            "Bytes of request bodies received.",
            ("route", "replica"),
            registry=registry,
        )
        self._sent = Counter(
            "serve_app_http_sent_bytes", "Bytes of response bodies sent.", ("route", "replica"), registry=registry
        )
        self._stored = Gauge(
            "serve_app_stored_responses",
            "Responses of the Responses API that the process keeps.",
            ("replica",),
            registry=registry,
        ).labels(replica)
        self._stored_bytes = Gauge(
            "serve_app_stored_responses_bytes",
            "Approximate memory of the responses that the process keeps.",
            ("replica",),
            registry=registry,
        ).labels(replica)
        self._removed = Counter(
            "serve_app_removed_responses",
            "Stored responses that were removed because of their age or a limit of the store.",
            ("replica",),
            registry=registry,
        ).labels(replica)

    def families(self) -> list[Metric]:
        return list(self._registry.collect())

    def refused(self, code: str, model: str) -> None:
        """Count an error. A model that is not configured is counted as ""."""
        self._errors.labels(model if model in self._models else "", self._replica, code).inc()

    def auth_refused(self, reason: str) -> None:
        """Count a call that was refused for one of REASONS."""
        self._auth_refusals.labels(self._replica, reason).inc()

    def ended(self, call: HttpCall) -> None:
        method = call.method if call.method in _METHODS else "other"
        status = "left" if call.status is None else f"{call.status // 100}xx"
        self._calls.labels(call.route, method, status, self._replica).inc()
        labels = call.route, self._replica
        self._seconds.labels(*labels).observe(call.seconds)
        self._received.labels(*labels).inc(call.received)
        self._sent.labels(*labels).inc(call.sent)

    def responses_stored(self, count: int, size: int, removed: int) -> None:
        """Record the number of stored responses and their size in bytes, and count the ones removed by a limit."""
        self._stored.set(count)
        self._stored_bytes.set(size)
        self._removed.inc(removed)


class CacheSeries:
    """The response cache of one ingress."""

    def __init__(self, replica: str, models: Iterable[str]) -> None:
        self._registry = registry = CollectorRegistry()
        requests = Counter(
            "serve_app_response_cache_requests",
            "Requests by what the response cache did: 'hit' if it had the answer or an equal request was in progress, "
            "'miss', or 'bypass' if the request cannot be cached or asked for it.",
            (*_MODEL, "status"),
            registry=registry,
        )
        self._requests = {
            (model, status): requests.labels(model, replica, status.value) for model in models for status in CacheStatus
        }
        self._bytes = Gauge(
            "serve_app_response_cache_bytes",
            "Memory of the answers in the response cache of the process; 0 if a server keeps them.",
            ("replica",),
            registry=registry,
        ).labels(replica)
        self._errors = Counter(
            "serve_app_response_cache_errors",
            "Failed calls to the server that keeps the answers of the response cache; once a second while it is down.",
            ("replica",),
            registry=registry,
        ).labels(replica)

    def families(self) -> list[Metric]:
        return list(self._registry.collect())

    def looked_up(self, model: str, status: CacheStatus) -> None:
        """Count a request."""
        self._requests[model, status].inc()

    def stored(self, size: int) -> None:
        """The answers in this process have `size` bytes now."""
        self._bytes.set(size)

    def failed(self) -> None:
        """Count an error of the server that keeps the answers."""
        self._errors.inc()


class QuotaSeries:
    """The limits of keys and tenants at one ingress, and their usage. No label has the name of a key or a tenant."""

    def __init__(self, replica: str) -> None:
        self._registry = registry = CollectorRegistry()
        refusals = Counter(
            "serve_app_quota_refusals",
            "Requests that a limit refused, by the limit and by whose limit it is, 'key' or 'tenant'; 'store' and "
            "'unavailable' if the server of the limits did not answer.",
            ("replica", "subject", "limit"),
            registry=registry,
        )
        pairs = [(subject, field.name) for subject in ("key", "tenant") for field in fields(Limits)]
        self._refusals = {pair: refusals.labels(replica, *pair) for pair in (*pairs, ("store", "unavailable"))}
        self._errors = Counter(
            "serve_app_quota_store_errors",
            "Failed calls to the server that counts for all ingresses; once a second while it is down.",
            ("replica",),
            registry=registry,
        ).labels(replica)
        self._near = Gauge(
            "serve_app_budgets_nearly_used",
            "Budgets of keys and tenants of which at least 90 % are used or reserved, by period. Each process counts "
            "the budgets that its requests have checked.",
            ("replica", "period"),
            registry=registry,
        )
        for period in ("day", "month"):
            self._near.labels(replica, period)
        self._replica = replica
        self._unwritten = Gauge(
            "serve_app_usage_unwritten_requests",
            "Finished requests whose usage could not be written to the database yet; 0 while the database can be "
            "written.",
            ("replica",),
            registry=registry,
        ).labels(replica)
        self._lost = Counter(
            "serve_app_usage_lost_requests",
            "Finished requests whose usage is not kept, because too many rows waited for the database.",
            ("replica",),
            registry=registry,
        ).labels(replica)

    def families(self) -> list[Metric]:
        return list(self._registry.collect())

    def refused(self, subject: str, kind: str) -> None:
        """Count a request that was refused. `subject` is "key" or "tenant", and `kind` names the limit."""
        self._refusals[subject, kind].inc()

    def store_failed(self) -> None:
        """Count an error of the server that counts for all ingresses."""
        self._errors.inc()

    def watch_budgets(self, count: Callable[[str], int]) -> None:
        """Show the number of budgets of a period, "day" or "month", that are nearly used."""
        for period in ("day", "month"):
            self._near.labels(self._replica, period).set_function(partial(count, period))

    def unwritten(self, requests: int) -> None:
        """So many requests could not be written to the database yet."""
        self._unwritten.set(requests)

    def lost(self, requests: int) -> None:
        """Count requests whose usage is not kept."""
        self._lost.inc(requests)


class GenAiSeries:
    """The times of requests under OpenTelemetry's names for generative AI, with the buckets of its conventions.

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
            "Time from the arrival of a request to its last token or its error.",
            (*self._LABELS, "error_type"),
            buckets=self._DURATION,
            registry=self._registry,
        )
        self._ttft = self._histogram(
            "time_to_first_token", "Time from the arrival of a request to its first token.", self._TTFT
        )
        self._tpot = self._histogram(
            "time_per_output_token", "Mean time per token after the first token of a complete response.", self._TPOT
        )

    def families(self) -> list[Metric]:
        return list(self._registry.collect())

    def ended(
        self, model: str, operation: str, error: str, seconds: float, ttft_s: float | None, tpot_s: float | None
    ) -> None:
        """Record a request. `error` is "" for a complete response; a time that was not measured is None."""
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
    """The sizes and times of one engine's steps. The engine's thread calls `observe`."""

    def __init__(self, model: str, replica: str) -> None:
        super().__init__(model, replica)
        self._size = self._histogram("engine_batch_size", "Sequences in an engine step.", _ROWS)
        self._tokens = self._histogram(
            "engine_batch_tokens", "Tokens computed in an engine step, including drafts.", _ROWS
        )
        seconds = Histogram(
            "serve_app_engine_step_seconds",
            "Duration of an engine step, by what its sequences compute: prefill, decode or mixed.",
            (*_MODEL, "phase"),
            buckets=_STEP,
            registry=self._registry,
        )
        phases = ("prefill", "decode", "mixed")
        self._seconds = {phase: seconds.labels(model, replica, phase) for phase in phases}

    def observe(self, step: Step, seconds: float) -> None:
        """Record a step that succeeded, and its duration."""
        self._size.observe(len(step.advances))
        self._tokens.observe(step.rows)
        decoding = sum(advance.count == 1 for advance in step.advances)
        phase = "decode" if decoding == len(step.advances) else "mixed" if decoding else "prefill"
        self._seconds[phase].observe(seconds)
        self.changed = True


class EngineMetrics:
    """The state and the counters of one engine, read whenever `families` is called.

    `load_s` are the seconds of each phase of its load.
    """

    def __init__(self, model: str, replica: str, engine: ReplicaEngine, load_s: Mapping[str, float]) -> None:
        self._labels = [model, replica]
        self._engine = engine
        self._load_s = load_s

    def families(self) -> list[Metric]:
        stats = self._engine.stats()
        gauges = {
            "running_sequences": ("Sequences that occupy a slot of the KV cache.", stats.running),
            "queue_depth": ("Sequences that wait for a slot of the KV cache.", stats.waiting),
            "slots": ("Slots of the KV cache: the maximum number of running sequences.", stats.slots),
            "kv_usage_ratio": (
                "Share of the KV cache that the tokens of running sequences occupy, from 0 to 1.",
                stats.tokens_held / stats.kv_tokens,
            ),
            "engine_step_age_seconds": (
                "Time since the start of the current engine step; 0 between steps.",
                self._engine.step_age(),
            ),
            "model_load_seconds": (
                "Time from the start of the replica until its model was ready.",
                sum(self._load_s.values()),
            ),
        }
        counters = {
            "engine_steps": ("Engine steps that succeeded. A step is one forward pass of the model.", stats.steps),
            "engine_rows": (
                "Tokens computed in engine steps, including drafts; divided by engine_steps: the mean tokens per step.",
                stats.rows,
            ),
            "engine_generated_tokens": (
                "Tokens that the engine generated, including tokens that no client received.",
                stats.generated_tokens,
            ),
            "engine_preemptions": (
                "Sequences that lost their slot because the KV cache was full; they are computed again later.",
                stats.preemptions,
            ),
            "prefix_cache_queried_tokens": ("Prompt tokens looked up in the prefix cache.", stats.prompt_tokens),
            "prefix_cache_hit_tokens": ("Prompt tokens found in the prefix cache.", stats.cached_tokens),
            "draft_tokens": ("Draft tokens proposed by speculative decoding.", stats.drafted),
            "draft_accepted_tokens": ("Draft tokens that the model accepted.", stats.accepted),
            **(_step_counters(stats) if isinstance(stats, StepStats) else {}),
        }
        info = _gauge("runner_info", _RUNNER_INFO, (*_MODEL, "kind", "quantization"))
        info.add_metric([*self._labels, self._engine.kind, self._engine.quantization], 1)
        phases = _gauge("model_load_phase_seconds", "Time of each phase of a model's load.", (*_MODEL, "phase"))
        for phase, seconds in self._load_s.items():
            phases.add_metric([*self._labels, phase], seconds)
        families: list[Metric] = [info, phases]
        for name, (text, value) in gauges.items():
            gauge = _gauge(name, text, _MODEL)
            gauge.add_metric(self._labels, value)
            families.append(gauge)
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(f"serve_app_{name}", text, labels=_MODEL)
            counter.add_metric(self._labels, value)
            families.append(counter)
        return families


def _step_counters(stats: StepStats) -> dict[str, tuple[str, float]]:
    """The counters of an engine that runs its steps itself."""
    return {
        "engine_failed_steps": ("Engine steps that failed.", stats.failed_steps),
        "engine_decode_rows": (
            "Tokens computed for decoding sequences in engine steps, including drafts.",
            stats.decode_rows,
        ),
        "engine_busy_seconds": ("Time spent in engine steps.", stats.busy_s),
    }


def states(models: Iterable[tuple[str, ModelState, int]]) -> list[Metric]:
    """The state and the number of ready replicas of each model; `models` gives its name, state and ready replicas."""
    state = _gauge("model_state", "1 for the current state of the model, 0 for the other states.", ("model", "state"))
    ready = _gauge("ready_replicas", "Replicas that can serve requests.", ("model",))
    for name, current, replicas in models:
        ready.add_metric([name], replicas)
        for one in ModelState:
            state.add_metric([name, one.value], one is current)
    return [state, ready]


def ages(seconds: Iterable[tuple[str, str, float]]) -> list[Metric]:
    """The age of the latest report of each process, given by model ("" for an ingress), replica and seconds."""
    age = _gauge("snapshot_age_seconds", "Time since a process last reported its metrics to this ingress.", _MODEL)
    for model, replica, since in seconds:
        age.add_metric([model, replica], since)
    return [age]


def metrics_complete(complete: bool) -> Metric:
    text = "1 if every process has had time to report its metrics to this ingress; 0 if some may be missing."
    family = _gauge("metrics_complete", text, ())
    family.add_metric([], complete)
    return family


def build(model: str, replica: str) -> Metric:
    """The versions of the service, of Python and of the main packages in this process."""
    packages = ("ray", "torch", "transformers")
    text = "Versions of the service, Python and the main packages in a process; the value is always 1."
    family = _gauge("build_info", text, (*_MODEL, "version", "python", *packages))
    versions = [__version__, platform.python_version(), *map(_version, packages)]
    family.add_metric([model, replica, *versions], 1)
    return family


def lag(model: str, replica: str, seconds: float) -> Metric:
    text = "Delay of a process's event loop when it sent its latest report."
    family = _gauge("event_loop_lag_seconds", text, _MODEL)
    family.add_metric([model, replica], seconds)
    return family


def gpu() -> dict[str, GaugeMetricFamily]:
    """Empty metrics of GPUs, with the labels `node` (a host name) and `gpu` (NVML's UUID)."""
    texts = {
        "memory_used_bytes": "GPU memory in use by all processes on the GPU.",
        "memory_total_bytes": "Total memory of the GPU.",
        "utilization_ratio": "Share of time in which a kernel ran on the GPU, from 0 to 1.",
    }
    return {name: _gauge(f"gpu_{name}", text, (*_MODEL, "node", "gpu")) for name, text in texts.items()}


def _gauge(name: str, text: str, labels: tuple[str, ...]) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"serve_app_{name}", text, labels=labels)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
